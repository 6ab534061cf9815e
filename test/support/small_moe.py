"""The small MoE model whose costs the router's tests count in."""

from __future__ import annotations

from typing import Any

from asyncep_router.cost import ModelCost

SMALL_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "moe_intermediate_size": 384,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 1000,
}
COST = ModelCost.from_config(SMALL_MOE)
