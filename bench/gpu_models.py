"""The models the GPU tables speak of: of their published configurations, what the cost model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Layers of the random model that stands in for a checkpoint that is not there: 11 GB, a minute to make.
RANDOM_LAYERS = 8

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
}

MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": _QWEN3
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
    },
    "Qwen3-235B-A22B": _QWEN3
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "vocab_size": 129280,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "vocab_size": 201088,
    },
}


def here(model: str) -> str:
    """A folder or hub name whose weights are on this machine: ``model``'s, or random ones of Qwen3-30B-A3B's shape."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from models import QWEN3_147M, random_qwen3

    if Path(model).is_dir():
        return model
    try:
        return str(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        config = QWEN3_147M | MODELS["Qwen3-30B-A3B"] | {"num_hidden_layers": RANDOM_LAYERS}
        config.pop("model_type")
        return str(random_qwen3(f"qwen3-30b-a3b-{RANDOM_LAYERS}-layers", config))
