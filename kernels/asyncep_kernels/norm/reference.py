"""What ``rms_norm`` means."""

from __future__ import annotations

import torch

from asyncep_kernels.workspace import Workspace


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``s / sqrt(mean(s**2) + eps) * weight`` over the last dimension, with ``s = x + residual``, all in fp32.

    Args:
        x: ``(..., H)``, bf16 or fp32; left as it is.
        weight: ``(H,)``.
        residual: as ``x``, left as it is, or None for zero.
        workspace: unused here.

    Returns:
        The norm and s, both rounded to ``x``'s dtype; None for s without a residual.

    Raises:
        ValueError: shapes do not fit.
    """
    check(x, weight, residual)
    total = x.float() if residual is None else x.float() + residual.float()
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.float()
    return normed.to(x.dtype), None if residual is None else total.to(x.dtype)


def check(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Checks shapes.

    Raises:
        ValueError: they do not fit.
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        other = None if residual is None else tuple(residual.shape)
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and residual {other} do not fit together")
