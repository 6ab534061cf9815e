"""``permute`` and ``unpermute`` on CPUs out of torch's own operators."""

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
    """``permute`` of `asyncep_kernels.permute.reference`, equal to it in every element. Args, errors: as there."""
    check_permute(topk_ids, experts, block, order)
    flat = topk_ids.reshape(-1).long()
    assignments = flat.numel()
    sequence = torch.arange(experts) if order is None else order.long()
    rank = torch.empty_like(sequence)
    rank[sequence] = torch.arange(experts)
    valid = (flat >= 0) & (flat < experts)
    # Ignored assignments sort behind all others.
    keys = torch.where(valid, rank[flat.clamp(0, experts - 1)], experts)
    sorted_keys, sorted_rows = torch.sort(keys, stable=True)
    counts = torch.bincount(keys, minlength=experts + 1)[:experts]
    blocks = (counts + block - 1).div(block, rounding_mode="floor")
    start = torch.cumsum(blocks, 0) * block - blocks * block
    first = torch.cumsum(counts, 0) - counts
    kept = int(counts.sum())
    sorted_keys, sorted_rows = sorted_keys[:kept], sorted_rows[:kept]
    place = start[sorted_keys] + torch.arange(kept) - first[sorted_keys]
    size = capacity(assignments, experts, block)
    rows = torch.full((size,), assignments, dtype=torch.int32)
    rows[place] = sorted_rows.int()
    position = torch.full((assignments,), -1, dtype=torch.int32)
    position[sorted_rows] = place.int()
    block_expert = torch.full((size // block,), -1, dtype=torch.int32)
    used = sequence.repeat_interleave(blocks)
    block_expert[: used.numel()] = used.int()
    return Permutation(rows, block_expert, counts[rank].int(), position.view(topk_ids.shape))


def unpermute(
    rows: torch.Tensor,
    position: torch.Tensor,
    weights: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``unpermute`` of `asyncep_kernels.permute.reference`, within one rounding of it. Args, errors: as there."""
    check_unpermute(rows, position, weights)
    result = torch.zeros(position.shape[0], rows.shape[1])
    for k in range(position.shape[1]):
        token = (position[:, k] >= 0).nonzero().flatten()
        picked = rows.index_select(0, position[token, k].long()).float()
        result.index_add_(0, token, picked * weights[token, k, None].float())
    return result.to(rows.dtype) if out is None else out.copy_(result)
