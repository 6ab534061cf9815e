"""The model that the suites serve: tiny, so that servers start fast and many fit a machine; with tokenizer and chat."""

from __future__ import annotations

from pathlib import Path

from models import QWEN3_TINY, random_qwen3, word_tokenizer

VOCABULARY: int = QWEN3_TINY["vocab_size"]
CONTEXT = 4096
# Wide enough that another prompt's answer differs by far more than rounding, so that a wrong answer is seen.
_SPREAD = 0.3
_CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<assistant>"


def hostile_model() -> Path:
    """The checkpoint's folder, built on first use."""
    config = {**QWEN3_TINY, "initializer_range": _SPREAD, "max_position_embeddings": CONTEXT}

    def with_tokenizer(folder: Path) -> None:
        tokenizer, _ = word_tokenizer(VOCABULARY)
        tokenizer.chat_template = _CHAT
        tokenizer.save_pretrained(folder)

    return random_qwen3("hostile-chat", config, with_tokenizer)
