"""The cost model against torch's FLOP counter, on a real forward pass of every model family.

Models are tiny and random, but their widths are chosen so that products dominate as they do in real
ones. Eager attention multiplies the full square of queries and keys and masks afterwards, so the
comparison counts squares (`AttentionCounting.SQUARE`); nothing else is adjusted.
"""

from __future__ import annotations

from typing import Any

import pytest

from asyncep_router.cost import AttentionCounting, ModelCost

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "intermediate_size": 512,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 512},
    "mistral": {"intermediate_size": 512, "sliding_window": None},
    "qwen2": {"intermediate_size": 512},
    "qwen3": {"intermediate_size": 512, "head_dim": 64},
    "qwen2_moe": {
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 192,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 64,
        "mlp_only_layers": [1],
    },
    "mixtral": {"intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 4},
    "deepseek_v2": LATENT | {"q_lora_rank": None},
    "deepseek_v3": LATENT | {"q_lora_rank": 128},
    "gpt_oss": {
        "intermediate_size": 256,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "sliding_window": 32,
    },
    "glm4_moe": {
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 64,
    },
}


def _model(family: str) -> Any:
    config = transformers.AutoConfig.for_model(family, **(SMALL | FAMILIES[family]))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    with torch.device("cpu"):
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def _counted(model: Any, tokens: int, past: Any = None, **settings: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.arange(tokens)[None] % 1000
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, past_key_values=past, logits_to_keep=1, **settings)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_whole_pass_within_one_percent(family: str) -> None:
    model = _model(family)
    cost = ModelCost.from_config(model.config.to_dict(), counting=AttentionCounting.SQUARE)
    for tokens in (24, 192):
        assert cost.flops(tokens) == pytest.approx(_counted(model, tokens, use_cache=False), rel=0.01)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_pass_after_a_cached_prefix_within_one_percent(family: str) -> None:
    """Latent attention caches latents and expands the cached ones again: `mla_expand_cached`."""
    model = _model(family)
    cost = ModelCost.from_config(model.config.to_dict(), counting=AttentionCounting.SQUARE, mla_expand_cached=True)
    with torch.no_grad():
        past = model(torch.arange(96)[None], use_cache=True).past_key_values
    assert cost.flops(64, 96) == pytest.approx(_counted(model, 64, past), rel=0.01)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_within_one_percent(family: str) -> None:
    model = _model(family)
    held = sum(p.numel() for p in model.parameters())
    cost = ModelCost.from_config(model.config.to_dict(), weight_itemsize=1, expert_itemsize=1)
    assert cost.weight_bytes == pytest.approx(held, rel=0.01)
