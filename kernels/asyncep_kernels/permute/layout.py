"""The order in which a grouped GEMM sees its rows."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Permutation(NamedTuple):
    """Assignments (token, k), numbered ``t * K + k``, ordered by expert; each expert begins a block of its own.

    The tensors' sizes depend on shapes alone, so that nothing has to be read back: the last blocks may be unused.
    """

    rows: torch.Tensor
    """``(capacity,)`` int32: the assignment at each place, ascending within an expert; ``T * K`` for none."""
    block_expert: torch.Tensor
    """``(capacity / block,)`` int32: whose rows a block holds; -1 for an unused one."""
    counts: torch.Tensor
    """``(E,)`` int32: assignments of each expert."""
    position: torch.Tensor
    """``(T, K)`` int32: where in ``rows`` each assignment stands; -1 for an ignored one."""


def capacity(assignments: int, experts: int, block: int) -> int:
    """Places that suffice however the routing falls: no more than ``min(E, assignments)`` experts have a ragged end."""
    ragged = min(experts, assignments)
    return (assignments + ragged * (block - 1)) // block * block


def check_permute(topk_ids: torch.Tensor, experts: int, block: int, order: torch.Tensor | None) -> None:
    """Checks shapes and sizes.

    Raises:
        ValueError: they do not fit.
    """
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids {tuple(topk_ids.shape)}: want (T, K)")
    if experts < 1 or block < 1:
        raise ValueError(f"experts={experts}, block={block}: want at least 1")
    if order is not None and order.shape != (experts,):
        raise ValueError(f"order {tuple(order.shape)}: want ({experts},)")


def check_unpermute(rows: torch.Tensor, position: torch.Tensor, weights: torch.Tensor) -> None:
    """Checks shapes.

    Raises:
        ValueError: they do not fit.
    """
    if rows.dim() != 2 or position.dim() != 2 or weights.shape != position.shape:
        raise ValueError(
            f"rows {tuple(rows.shape)}, position {tuple(position.shape)}, weights {tuple(weights.shape)}: "
            "want (R, H), (T, K), (T, K)"
        )
