"""``permute`` and ``unpermute`` on GPUs: three launches and one, no host synchronisation, no atomics.

Assignments are cut into chunks. One launch counts each chunk's assignments per expert, the next sums the counts over
chunks, the last places every assignment: its expert's start, what earlier chunks hold, its rank within the chunk.
So the order is the same in every run, tokens ascending, which keeps neighbouring rows of a GEMM near each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from asyncep_kernels.permute.layout import Permutation, capacity, check_permute, check_unpermute
from asyncep_kernels.triton_support import INTERPRETED, launch, power_of_two, round_to
from asyncep_kernels.workspace import Workspace

CHUNK = 64
SCAN_EXPERTS = 16
SCAN_CHUNKS = 64
MAX_EXPERTS = 512


# What differs from batch to batch is not specialised on: that would compile while requests wait.
@triton.jit(do_not_specialize=["assignments"])
def count_kernel(ids, chunk_counts, assignments, experts, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """``chunk_counts[c, e]``: assignments of chunk c for expert e."""
    chunk = tl.program_id(0)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + index, mask=index < assignments, other=-1).to(tl.int32)
    valid = (expert >= 0) & (expert < experts)
    counts = tl.histogram(tl.where(valid, expert, 0), BINS, mask=valid)
    bins = tl.arange(0, BINS)
    tl.store(chunk_counts + chunk * experts + bins, counts, mask=bins < experts)


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(chunk_counts, counts, chunks, experts, EXPERTS: tl.constexpr, CHUNKS: tl.constexpr):
    """Counts of a chunk become those of all chunks before it; ``counts[e]`` is the total."""
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        where = chunk_counts + chunk[:, None] * experts + expert[None, :]
        mask = (chunk[:, None] < chunks) & (expert[None, :] < experts)
        found = tl.load(where, mask=mask, other=0)
        tl.store(where, tl.cumsum(found, 0) - found + total[None, :], mask=mask)
        total += tl.sum(found, 0)
    tl.store(counts + expert, total, mask=expert < experts)


@triton.jit(do_not_specialize=["assignments", "chunks", "blocks"])
def place_kernel(
    ids,
    order,
    chunk_counts,
    counts,
    rows,
    block_expert,
    position,
    assignments,
    experts,
    chunks,
    blocks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """The first ``chunks`` programs place a chunk's assignments each, the others name the experts of blocks."""
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    if ORDERED:
        ordered = tl.load(order + bins, mask=bins < experts, other=-1)
    else:
        ordered = tl.where(bins < experts, bins, -1)
    count = tl.load(counts + ordered, mask=bins < experts, other=0)
    padded = (count + BLOCK - 1) // BLOCK * BLOCK
    end = tl.cumsum(padded, 0)
    if program < chunks:
        local = tl.arange(0, CHUNK)
        index = program * CHUNK + local
        expert = tl.load(ids + index, mask=index < assignments, other=-1).to(tl.int32)
        valid = (expert >= 0) & (expert < experts)
        expert = tl.where(valid, expert, -2)
        start = tl.sum(tl.where(expert[:, None] == ordered[None, :], (end - padded)[None, :], 0), 1)
        before = tl.load(chunk_counts + program * experts + expert, mask=valid, other=0)
        earlier = (expert[:, None] == expert[None, :]) & (local[None, :] < local[:, None])
        place = start + before + tl.sum(earlier.to(tl.int32), 1)
        tl.store(rows + place, index, mask=valid)
        tl.store(position + index, tl.where(valid, place, -1), mask=index < assignments)
    else:
        block = (program - chunks) * CHUNK + tl.arange(0, CHUNK)
        rank = tl.sum((end[None, :] <= (block * BLOCK)[:, None]).to(tl.int32), 1)
        # Only experts with rows end behind a block's first row; `rank` skips the empty ones before.
        used = rank < BINS
        owner = tl.sum(tl.where(bins[None, :] == rank[:, None], ordered[None, :], 0), 1)
        tl.store(block_expert + block, tl.where(used, owner, -1), mask=block < blocks)


@triton.jit
def unpermute_kernel(rows, position, weights, out, top_k, width, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr):
    """One token, WIDTH of its elements."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    total = tl.zeros([WIDTH], tl.float32)
    for k in range(0, top_k):
        place = tl.load(position + token * top_k + k).to(tl.int64)
        if place >= 0:
            weight = tl.load(weights + token * top_k + k).to(tl.float32)
            total += weight * tl.load(rows + place * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, round_to(total, out.dtype.element_ty, INTERPRETED), mask=inside)


def place_warps(bins: int) -> int:
    """Warps that hold CHUNK x bins numbers in registers without spilling."""
    return 8 if bins <= 256 else 16


def permute(
    topk_ids: torch.Tensor,
    experts: int,
    block: int,
    *,
    order: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> Permutation:
    """``permute`` of `asyncep_kernels.permute.reference`, equal to it in every element.

    Args, errors: as the reference. The result's tensors are the workspace's until its next use; ``block`` must be a
    power of two and there may be at most 512 experts.
    """
    check_permute(topk_ids, experts, block, order)
    if block & (block - 1) or experts > MAX_EXPERTS:
        raise ValueError(f"block={block}, experts={experts}: want a power of two and at most {MAX_EXPERTS}")
    workspace = workspace or Workspace()
    device = topk_ids.device
    flat = topk_ids.contiguous().view(-1)
    assignments = flat.numel()
    size = capacity(assignments, experts, block)
    rows = workspace.take("permute.rows", (size,), torch.int32, device).fill_(assignments)
    block_expert = workspace.take("permute.blocks", (size // block,), torch.int32, device)
    counts = workspace.take("permute.counts", (experts,), torch.int32, device)
    position = workspace.take("permute.position", (assignments,), torch.int32, device)
    if assignments == 0:
        counts.zero_()
        return Permutation(rows, block_expert, counts, position.view(topk_ids.shape))
    chunks = triton.cdiv(assignments, CHUNK)
    bins = max(16, power_of_two(experts))
    chunk_counts = workspace.take("permute.chunks", (chunks, experts), torch.int32, device)
    launch(count_kernel, (chunks,), flat, chunk_counts, assignments, experts, CHUNK=CHUNK, BINS=bins)
    scans = (triton.cdiv(experts, SCAN_EXPERTS),)
    launch(scan_kernel, scans, chunk_counts, counts, chunks, experts, EXPERTS=SCAN_EXPERTS, CHUNKS=SCAN_CHUNKS)
    launch(
        place_kernel,
        (chunks + triton.cdiv(size // block, CHUNK),),
        flat,
        flat if order is None else order,
        chunk_counts,
        counts,
        rows,
        block_expert,
        position,
        assignments,
        experts,
        chunks,
        size // block,
        BLOCK=block,
        CHUNK=CHUNK,
        BINS=bins,
        ORDERED=order is not None,
        num_warps=place_warps(bins),
    )
    return Permutation(rows, block_expert, counts, position.view(topk_ids.shape))


def unpermute(
    rows: torch.Tensor,
    position: torch.Tensor,
    weights: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``unpermute`` of `asyncep_kernels.permute.reference`, within one rounding of it.

    Args, errors: as the reference; ``rows`` must be contiguous.
    """
    check_unpermute(rows, position, weights)
    tokens, top_k = position.shape
    width = rows.shape[1]
    target = out if out is not None and out.is_contiguous() else rows.new_empty((tokens, width))
    block = min(1024, power_of_two(width))
    grid = (tokens, triton.cdiv(width, block))
    launch(
        unpermute_kernel,
        grid,
        rows,
        position.contiguous(),
        weights.contiguous(),
        target,
        top_k,
        width,
        WIDTH=block,
        INTERPRETED=INTERPRETED,
    )
    return target if out is None or out is target else out.copy_(target)
