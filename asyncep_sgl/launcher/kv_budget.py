"""How many tokens of KV cache a rank gets on a CPU, where all ranks draw on one memory. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyncep_router.cost import ModelCost
from asyncep_sgl.config.run import LARGEST_BATCH_TOKENS

# SGLang sizes the cache of every rank as if it had the host to itself; two ranks would ask for twice the memory.
SHARE_OF_FREE_MEMORY = 0.3
LEAST_TOKENS = 4096
# Beyond this, more cache saves little and only makes the start slower.
MOST_TOKENS = 262_144


def kv_tokens(config: Mapping[str, Any], *, ranks: int, free_bytes: int, item_bytes: int = 2) -> int:
    """Tokens of KV cache for each of ``ranks`` ranks on a host with ``free_bytes`` of memory free.

    Args:
        config: Hugging Face configuration.
        item_bytes: bytes of one number in the cache, as in the weights.
    """
    per_token = ModelCost.from_config(config, kv_itemsize=item_bytes).kv_bytes_per_token
    tokens = int(free_bytes * SHARE_OF_FREE_MEMORY / ranks / per_token)
    return max(LEAST_TOKENS, min(MOST_TOKENS, tokens))


def one_batch_tokens(config: Mapping[str, Any], flags: Sequence[str]) -> int:
    """Tokens of KV cache for a rank that keeps nothing between batches: the longest prompt, come to its last piece,
    beside one more batch.

    Args:
        config: Hugging Face configuration.
        flags: SGLang's own, as the user gave them.
    """
    context = _given(flags, "--context-length") or int(config.get("max_position_embeddings", LEAST_TOKENS))
    batch = _given(flags, "--chunked-prefill-size") or LARGEST_BATCH_TOKENS
    return max(LEAST_TOKENS, context + max(batch, 0))


def _given(flags: Sequence[str], name: str) -> int | None:
    for at, flag in enumerate(flags):
        value = flag.removeprefix(name + "=") if flag.startswith(name + "=") else None
        if flag == name and at + 1 < len(flags):
            value = flags[at + 1]
        if value is not None and value.lstrip("-").isdigit():
            return int(value)
    return None
