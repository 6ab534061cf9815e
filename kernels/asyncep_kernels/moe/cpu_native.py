"""``moe`` in C (`cpu.c`): bf16 experts on CPUs with AVX512-BF16 or AMX."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.native.library import library, share, split
from asyncep_kernels.workspace import Workspace

# Rows and columns of a product.
_STEP = 32


def serves(hidden: torch.Tensor, experts: ExpertTable) -> bool:
    """Whether these dtypes, shapes and this machine are the C kernel's."""
    inter, width = experts.w2[0].shape[1], hidden.shape[1]
    return (
        hidden.dtype == torch.bfloat16
        and hidden.device.type == "cpu"
        and hidden.stride(1) == 1
        and experts.w13[0].dtype == torch.bfloat16
        and width % _STEP == 0
        and inter % _STEP == 0
        and _plain(experts.w13)
        and _plain(experts.w2)
        and library() is not None
    )


def moe(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: ExpertTable,
    out: torch.Tensor | None,
    workspace: Workspace,
) -> torch.Tensor:
    """``moe`` of `asyncep_kernels.moe.reference` where `serves` says yes; shapes have been checked.

    The gated product and each expert's output are rounded to bf16; all sums are fp32. A token's result does not
    depend on what else is in the batch. Within 2 % of the reference's largest output.

    Raises:
        ValueError: an expert id is as large as the number of experts.
        MemoryError: no scratch memory.
    """
    kernels = library()
    if kernels is None:
        raise RuntimeError("the C kernels are not loaded")
    tokens, width = hidden.shape
    k, count, inter = topk_ids.shape[1], len(experts.w13), experts.w2[0].shape[1]
    if out is None:
        out = torch.empty(hidden.shape, dtype=hidden.dtype)
    if tokens == 0 or k == 0:
        return out.zero_()
    ids = topk_ids.to(torch.int32).contiguous()
    weights = topk_weights.to(torch.float32).contiguous()
    starts = workspace.take("moe.starts", (count + 1,), torch.int64)
    order = workspace.take("moe.order", (tokens * k,), torch.int32)
    place = workspace.take("moe.place", (tokens * k,), torch.int32)
    largest = kernels.asyncep_moe_route(
        ids.data_ptr(), tokens, k, count, starts.data_ptr(), order.data_ptr(), place.data_ptr()
    )
    if largest >= count:
        raise ValueError(f"expert id {largest}, but there are {count} experts")
    results = workspace.take("moe.results", (tokens * k, width), torch.bfloat16)
    first, second = _addresses(experts.w13), _addresses(experts.w2)
    share(
        lambda begun: kernels.asyncep_moe_experts(
            *(hidden.data_ptr(), hidden.stride(0), width, inter, count, starts.data_ptr(), order.data_ptr()),
            *(first.data_ptr(), second.data_ptr(), results.data_ptr(), begun),
        )
    )
    summed = out if out.stride(1) == 1 else torch.empty(hidden.shape, dtype=hidden.dtype)
    split(
        tokens,
        lambda start, end: kernels.asyncep_moe_combine(
            *(results.data_ptr(), place.data_ptr(), weights.data_ptr(), k, width, start, end),
            *(summed.data_ptr(), summed.stride(0)),
        ),
    )
    return out if summed is out else out.copy_(summed)


def _plain(side: torch.Tensor | Sequence[torch.Tensor]) -> bool:
    """Whether every expert's matrix is stored row after row."""
    if isinstance(side, torch.Tensor):
        return bool(side[0].is_contiguous())
    return all(each.is_contiguous() for each in side)


def _addresses(side: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """``(E,)`` int64: where each expert's matrix begins."""
    if isinstance(side, torch.Tensor):
        step = side.stride(0) * side.element_size()
        return torch.arange(side.shape[0], dtype=torch.int64).mul_(step).add_(side.data_ptr())
    return torch.tensor([each.data_ptr() for each in side], dtype=torch.int64)
