"""Random checkpoints of every served architecture, small enough to build in a second, with a tokenizer of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 512
CONTEXT = 2048
# Wide enough that experts, not the residual stream alone, decide the logits: a wrong expert moves a log-probability
# by far more than the tolerances (test_sensitivity proves it).
INITIALIZER_RANGE = 0.3

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": INITIALIZER_RANGE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

# Seven experts in some on purpose: two ranks do not divide them.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_COMMON,
        "head_dim": 16,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        **_COMMON,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 7,
        "num_experts_per_tok": 2,
    },
    "mixtral": {**_COMMON, "intermediate_size": 48, "num_local_experts": 7, "num_experts_per_tok": 2},
    # SGLang's OLMoE has no grouped queries, like the published model.
    "olmoe": {
        **_COMMON,
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}
ARCHITECTURES = tuple(_ARCHITECTURES)


def config(architecture: str, **overrides: Any) -> Any:
    """The Transformers configuration of an architecture's tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(architecture, **{**_ARCHITECTURES[architecture], **overrides})


def build(architecture: str, directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Writes a bf16 checkpoint and returns its folder. bf16 values are exact in fp32, so one checkpoint serves both."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(architecture, **overrides), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def tokenizer() -> Any:
    """A byte-level tokenizer of 512 tokens, trained on this file."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>"]
    trained.train([__file__], vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
