"""``rms_norm`` on CPUs: in C where the machine has AVX512-BF16, else one fp32 copy, kept between calls."""

from __future__ import annotations

import torch

from asyncep_kernels.native.library import library, split
from asyncep_kernels.norm.reference import check
from asyncep_kernels.workspace import Workspace


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    workspace: Workspace | None = None,
    consume: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``rms_norm`` of `asyncep_kernels.norm.reference`; the sum is equal to it, the norm to one rounding.

    Args, errors: as the reference. ``workspace`` keeps the weights in fp32, or the fp32 copy, for the next call. With
    ``consume`` and a residual the C kernel may write the norm over ``x`` and the sum over ``residual``: fresh memory
    would first have to be fetched into the cache.
    """
    check(x, weight, residual)
    workspace = workspace or Workspace()
    if _native_serves(x, residual):
        flat = x.reshape(-1, x.shape[-1])
        other = None if residual is None else residual.reshape(flat.shape)
        if consume and residual is not None and x.is_contiguous() and residual.is_contiguous():
            normed, summed = x, residual
        else:
            normed = torch.empty(x.shape, dtype=x.dtype)
            summed = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
        _native(flat, weight, eps, 1, normed.view(flat.shape), other, summed, workspace)
        return normed, summed
    total = workspace.take("norm.total", tuple(x.shape), torch.float32).copy_(x)
    # Copies, also in fp32: the next call writes over `total`.
    summed = None if residual is None else _copy(total.add_(residual), x.dtype)
    # linalg.vector_norm is one pass; a square and a mean are two and a temporary of x's size.
    scale = torch.linalg.vector_norm(total, dim=-1, keepdim=True).square_()
    scale.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return _copy(total.mul_(scale).mul_(weight), x.dtype), summed


def rms_norm_heads_(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, workspace: Workspace | None = None
) -> torch.Tensor:
    """Every head of every token normalised by itself, in place.

    Args:
        x: ``(T, heads * D)``, bf16 or fp32; tokens may lie apart, as in a slice of a joint projection.
        weight: ``(D,)``.

    Raises:
        ValueError: ``heads`` is no whole number.
    """
    dim = weight.shape[0]
    if x.dim() != 2 or x.shape[1] % dim:
        raise ValueError(f"x {tuple(x.shape)} has no whole number of heads of {dim}")
    workspace = workspace or Workspace()
    if x.stride(1) == 1 and _native_serves(x, None):
        _native(x, weight, eps, x.shape[1] // dim, x, None, None, workspace)
        return x
    normed, _ = rms_norm(x.view(x.shape[0], x.shape[1] // dim, dim), weight, eps, workspace=workspace)
    return x.copy_(normed.view(x.shape))


def _native_serves(x: torch.Tensor, residual: torch.Tensor | None) -> bool:
    same = residual is None or residual.dtype == x.dtype
    return x.dtype == torch.bfloat16 and same and x.device.type == "cpu" and library() is not None


def _native(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    heads: int,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    summed: torch.Tensor | None,
    workspace: Workspace,
) -> None:
    """x, out, residual: ``(rows, heads * D)``; rows may lie apart."""
    kernels = library()
    if kernels is None:
        raise RuntimeError("the C kernels are not loaded")
    width = x.shape[1]
    wide = workspace.take("norm.weight", tuple(weight.shape), torch.float32).copy_(weight)
    other = (None, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
    # Contiguous, whatever its shape.
    total = (None, 0) if summed is None else (summed.data_ptr(), width)
    split(
        x.shape[0],
        lambda first, last: kernels.asyncep_rms_norm(
            *(x.data_ptr(), x.stride(0), *other, wide.data_ptr(), eps, heads, width // heads, first, last),
            *(out.data_ptr(), out.stride(0), *total),
        ),
    )


def _copy(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(x.shape, dtype=dtype).copy_(x)
