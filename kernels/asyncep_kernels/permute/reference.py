"""What ``permute`` and ``unpermute`` mean, one assignment at a time. Slow."""

from __future__ import annotations

import torch

from asyncep_kernels.permute.layout import Permutation, capacity, check_permute, check_unpermute
from asyncep_kernels.workspace import Workspace


def permute(
    topk_ids: torch.Tensor,
    experts: int,
    block: int,
    *,
    order: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> Permutation:
    """Orders assignments by expert and pads each expert's rows to a multiple of ``block``.

    Args:
        topk_ids: ``(T, K)``, integers; those outside [0, experts) are ignored.
        experts: E.
        block: rows of a block.
        order: ``(E,)`` int32, a permutation of the experts: whose rows come first. Ascending when absent.
        workspace: unused here.

    Raises:
        ValueError: shapes or sizes do not fit.
    """
    check_permute(topk_ids, experts, block, order)
    flat = topk_ids.flatten().tolist()
    rows = torch.full((capacity(len(flat), experts, block),), len(flat), dtype=torch.int32)
    block_expert = torch.full((rows.numel() // block,), -1, dtype=torch.int32)
    counts = torch.zeros(experts, dtype=torch.int32)
    position = torch.full((len(flat),), -1, dtype=torch.int32)
    place = 0
    for expert in range(experts) if order is None else order.tolist():
        mine = [assignment for assignment, chosen in enumerate(flat) if chosen == expert]
        counts[expert] = len(mine)
        for offset, assignment in enumerate(mine):
            rows[place + offset] = assignment
            position[assignment] = place + offset
        blocks = -(-len(mine) // block)
        block_expert[place // block : place // block + blocks] = expert
        place += blocks * block
    return Permutation(rows, block_expert, counts, position.view(topk_ids.shape))


def unpermute(
    rows: torch.Tensor,
    position: torch.Tensor,
    weights: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out[t] = sum_k weights[t, k] * rows[position[t, k]]`` in fp32, k ascending, rounded once.

    Args:
        rows: ``(R, H)``, fp32 or bf16; rows that no position names are not read.
        position: ``(T, K)`` int32; negative ones contribute nothing.
        weights: ``(T, K)``, floating point.
        out: ``(T, H)`` of ``rows``' dtype, written and returned; made when absent.

    Raises:
        ValueError: shapes do not fit.
    """
    check_unpermute(rows, position, weights)
    result = torch.zeros(position.shape[0], rows.shape[1])
    for token in range(position.shape[0]):
        for place, weight in zip(position[token].tolist(), weights[token].float(), strict=True):
            if place >= 0:
                result[token] += weight * rows[place].float()
    return result.to(rows.dtype) if out is None else out.copy_(result)
