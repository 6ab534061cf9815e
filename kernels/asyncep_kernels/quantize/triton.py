"""``quantize`` on GPUs: one program a row, so that a row is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from asyncep_kernels.quantize.reference import LARGEST, check
from asyncep_kernels.triton_support import INTERPRETED, SMALLEST, launch, power_of_two, round_to
from asyncep_kernels.workspace import Workspace

TILE = 4096


@triton.jit
def quantize_kernel(
    x,
    q,
    scales,
    width,
    group,
    groups,
    LARGEST: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One row, GROUPS groups at a time."""
    row = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, GROUP)
    for first in range(0, groups, GROUPS):
        index = first + tl.arange(0, GROUPS)
        column = index[:, None] * group + element[None, :]
        inside = (element < group)[None, :] & (column < width)
        value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(value), 1), SMALLEST) / LARGEST
        scaled = tl.minimum(tl.maximum(value / scale[:, None], -LARGEST), LARGEST)
        if q.dtype.element_ty == tl.int8:
            stored = tl.floor(scaled + 0.5).to(tl.int8)
        else:
            stored = round_to(scaled, q.dtype.element_ty, INTERPRETED)
        tl.store(q + row * width + column, stored, mask=inside)
        tl.store(scales + row * groups + index, scale, mask=index < groups)


def quantize(
    x: torch.Tensor,
    dtype: torch.dtype,
    group: int,
    *,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize`` of `asyncep_kernels.quantize.reference`.

    The GPU's division may be off by two units in the last place, so a value half-way between two numbers may become
    the other one. The results are the workspace's until its next use. ``x`` must be contiguous.

    Args, errors: as the reference.
    """
    check(x, dtype, group)
    workspace = workspace or Workspace()
    rows, width = x.shape
    groups = triton.cdiv(width, group)
    padded = power_of_two(group)
    q = workspace.take("quantize.q", (rows, width), dtype, x.device)
    scales = workspace.take("quantize.scales", (rows, groups), torch.float32, x.device)
    launch(
        quantize_kernel,
        (rows,),
        x,
        q,
        scales,
        width,
        group,
        groups,
        LARGEST=LARGEST[dtype],
        GROUPS=min(power_of_two(groups), max(1, TILE // padded)),
        GROUP=padded,
        INTERPRETED=INTERPRETED,
        num_warps=8 if padded >= TILE else 4,
    )
    return q, scales
