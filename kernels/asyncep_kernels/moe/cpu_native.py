"""The stages of ``moe`` in C (`cpu.c`): bf16 experts on CPUs with AVX512-BF16 or AMX."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asyncep_kernels.moe.stages import Sorted
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.native.library import library, needed, share, split
from asyncep_kernels.workspace import Workspace

# Rows and columns of a product.
STEP = 32


def serves(hidden: torch.Tensor, experts: ExpertTable) -> bool:
    """Whether these dtypes, shapes and this machine are the C kernel's."""
    inter, width = experts.w2[0].shape[1], hidden.shape[1]
    return (
        hidden.dtype == torch.bfloat16
        and hidden.device.type == "cpu"
        and hidden.stride(1) == 1
        and experts.w13[0].dtype == torch.bfloat16
        and width % STEP == 0
        and inter % STEP == 0
        and _plain(experts.w13)
        and _plain(experts.w2)
        and library() is not None
    )


def sort(topk_ids: torch.Tensor, experts: int, workspace: Workspace) -> Sorted:
    """See `asyncep_kernels.moe.cpu.sort`."""
    tokens, k = topk_ids.shape
    ids = topk_ids.to(torch.int32).contiguous()
    starts = workspace.take("moe.starts", (experts + 1,), torch.int64)
    order = workspace.take("moe.order", (tokens * k,), torch.int32)
    place = workspace.take("moe.place", (tokens, k), torch.int32)
    largest = needed().asyncep_moe_route(
        ids.data_ptr(), tokens, k, experts, starts.data_ptr(), order.data_ptr(), place.data_ptr()
    )
    if largest >= experts:
        raise ValueError(f"expert id {largest}, but there are {experts} experts")
    return Sorted(starts, order, place)


def run(
    hidden: torch.Tensor, order: Sorted, experts: ExpertTable, results: torch.Tensor, first: int, last: int
) -> None:
    """See `asyncep_kernels.moe.cpu.run`. All sums are fp32; a row does not depend on what else is there.

    Raises:
        MemoryError: no scratch memory.
    """
    kernels = needed()
    inter, width = experts.w2[0].shape[1], hidden.shape[1]
    w13, w2 = addresses(experts.w13)[first:last].contiguous(), addresses(experts.w2)[first:last].contiguous()
    starts = order.starts[first:]
    share(
        lambda blocks: kernels.asyncep_moe_experts(
            *(hidden.data_ptr(), hidden.stride(0), width, inter, last - first, starts.data_ptr()),
            *(order.tokens.data_ptr(), w13.data_ptr(), w2.data_ptr(), results.data_ptr(), blocks),
        )
    )


def combine(results: torch.Tensor, place: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """See `asyncep_kernels.moe.cpu.combine`. Sums are fp32, rounded once."""
    kernels = needed()
    tokens, k = place.shape
    weights = weights.to(torch.float32).contiguous()
    summed = out if out.stride(1) == 1 else torch.empty(out.shape, dtype=out.dtype)
    split(
        tokens,
        lambda start, end: kernels.asyncep_moe_combine(
            *(results.data_ptr(), place.data_ptr(), weights.data_ptr(), k, out.shape[1], start, end),
            *(summed.data_ptr(), summed.stride(0)),
        ),
    )
    if summed is not out:
        out.copy_(summed)


def _plain(side: torch.Tensor | Sequence[torch.Tensor]) -> bool:
    """Whether every expert's matrix is stored row after row."""
    if isinstance(side, torch.Tensor):
        return bool(side[0].is_contiguous())
    return all(each.is_contiguous() for each in side)


def addresses(side: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """``(E,)`` int64: where each expert's matrix begins."""
    if isinstance(side, torch.Tensor):
        step = side.stride(0) * side.element_size()
        return torch.arange(side.shape[0], dtype=torch.int64).mul_(step).add_(side.data_ptr())
    return torch.tensor([each.data_ptr() for each in side], dtype=torch.int64)
