"""Random checkpoints for benches, built once into the user's cache."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The shape used for all figures on CPUs: 147M parameters, of which 19M are active for a token's experts.
QWEN3_147M: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# A billion parameters, 143M of them active.
QWEN3_1B: dict[str, Any] = {
    **QWEN3_147M,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}

# The same with almost nothing to compute, for quick modes.
QWEN3_TINY: dict[str, Any] = {
    **QWEN3_147M,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def random_qwen3(name: str, config: dict[str, Any], also: Callable[[Path], None] | None = None) -> Path:
    """The checkpoint's folder (bf16, seed 0); ``also`` adds what belongs into it."""

    def make(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, Qwen3MoeConfig

        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(Qwen3MoeConfig(**config), dtype=torch.bfloat16).save_pretrained(folder)
        if also is not None:
            also(folder)

    return _made_once(name, make)


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the user's cache; made under another name first, by one of the processes that want it at once."""
    cache = Path(os.environ.get("ASYNCEP_CACHE") or Path.home() / ".cache" / "asyncep")
    folder = cache / "bench-models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as place:
                made = Path(place) / name
                make(made)
                made.rename(folder)
    return folder


def word_tokenizer(vocabulary: int) -> tuple[Any, Path]:
    """A byte-level tokenizer trained on this folder's text, and its folder; random checkpoints have none."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    def make(folder: Path) -> None:
        trained = ByteLevelBPETokenizer()
        special = ["<pad>", "<s>", "</s>"]
        files = [str(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
        trained.train(files, vocab_size=vocabulary, special_tokens=special, show_progress=False)
        PreTrainedTokenizerFast(
            tokenizer_object=trained._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        ).save_pretrained(folder)

    folder = _made_once(f"tokenizer-{vocabulary}", make)
    return PreTrainedTokenizerFast.from_pretrained(folder), folder
