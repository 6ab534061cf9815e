"""``rotary_`` on CPUs: in C for bf16 where the machine has AVX512-BF16, else the reference's operators."""

from __future__ import annotations

import torch

from asyncep_kernels.native.library import library, split
from asyncep_kernels.rotary import reference


def rotary_(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, dim: int) -> torch.Tensor:
    """``rotary_`` of `asyncep_kernels.rotary.reference`, equal to it up to one rounding.

    Args, errors: as the reference. Positions must be rows of the table: they are not checked here.
    """
    reference.check(x, positions, table, dim)
    kernels = library()
    if kernels is None or x.dtype != torch.bfloat16 or x.stride(1) != 1 or not table.is_contiguous():
        return reference.rotary_(x, positions, table, dim)
    rows = positions.to(torch.int64).contiguous()
    split(
        x.shape[0],
        lambda first, last: kernels.asyncep_rotary(
            *(x.data_ptr(), x.stride(0), x.shape[1] // dim, dim, table.shape[1] // 2),
            *(rows.data_ptr(), table.data_ptr(), first, last),
        ),
    )
    return x
