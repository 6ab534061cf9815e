"""What ``route`` means."""

from __future__ import annotations

import torch


def route(logits: torch.Tensor, k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the softmax over a token's logits.

    Args:
        logits: ``(T, E)``, bf16 or fp32.
        k: at most E.
        renormalize: divide the k by their sum.

    Returns:
        ``(T, k)`` fp32 weights, largest first, and ``(T, k)`` int32 experts; of equal logits the lower expert first.

    Raises:
        ValueError: k is not from 1 to E.
    """
    check(logits, k)
    weights, ids = logits.float().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    weights, ids = weights[:, :k], ids[:, :k]
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.contiguous(), ids.int().contiguous()


def check(logits: torch.Tensor, k: int) -> None:
    """Checks shapes.

    Raises:
        ValueError: they do not fit.
    """
    if logits.dim() != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k {k} of logits {tuple(logits.shape)}: want (T, E) and k from 1 to E")
