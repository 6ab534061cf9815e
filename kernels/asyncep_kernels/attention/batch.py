"""What a batch of prefills is to attention: which rows are new, and where every key lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """Sequences side by side; the new tokens of one follow those of the one before it in ``q``.

    Any page size: a slot is the cache's row of one token, and consecutive tokens may lie anywhere.
    """

    new: Sequence[int]
    """New tokens of each sequence; 0 allowed."""
    prefix: Sequence[int]
    """Tokens of each sequence already in the cache before them."""
    slots: Sequence[torch.Tensor]
    """For each sequence ``(prefix + new,)`` or longer, integers: the cache row of each of its tokens."""

    @property
    def tokens(self) -> int:
        """New tokens in all: rows of ``q``."""
        return sum(self.new)


def check(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Batch, window: int | None = None
) -> None:
    """Checks what every implementation relies on, without looking at the contents of a tensor.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if q.dim() != 3 or k_cache.dim() != 3 or v_cache.dim() != 3:
        raise ValueError(
            f"want q, k_cache and v_cache in three dimensions, not {q.dim()}, {k_cache.dim()}, {v_cache.dim()}"
        )
    if q.shape[0] != batch.tokens:
        raise ValueError(f"q has {q.shape[0]} rows, the batch {batch.tokens} new tokens")
    if q.shape[2] != k_cache.shape[2] or k_cache.shape[:2] != v_cache.shape[:2] or q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k_cache.shape)}, v {tuple(v_cache.shape)} do not fit together")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"dtypes differ: q {q.dtype}, k {k_cache.dtype}, v {v_cache.dtype}")
    if window is not None and window < 0:
        raise ValueError(f"window {window} is negative")
