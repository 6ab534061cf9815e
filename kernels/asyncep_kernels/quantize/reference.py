"""What ``quantize`` means."""

from __future__ import annotations

import torch

from asyncep_kernels.workspace import Workspace

# Largest number of each format, which the largest of a group becomes.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# Below it a group counts as zero, so that no scale is.
SMALLEST = 1e-10


def quantize(
    x: torch.Tensor,
    dtype: torch.dtype,
    group: int,
    *,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x ~ q * scale``: each group's largest element becomes the format's largest number.

    Args:
        x: ``(R, W)``, fp32 or bf16, finite.
        dtype: float8_e4m3fn (to nearest even) or int8 (to nearest, halves up).
        group: elements of a row that share a scale; the last group may be smaller. W for a scale a row.
        workspace: unused here.

    Returns:
        q, ``(R, W)`` of ``dtype``, and the scales, ``(R, ceil(W / group))`` fp32.

    Raises:
        ValueError: shapes or the dtype do not fit.
    """
    check(x, dtype, group)
    rows, width = x.shape
    groups = -(-width // group)
    padded = torch.nn.functional.pad(x.float(), (0, groups * group - width)).view(rows, groups, group)
    scale = padded.abs().amax(-1).clamp(min=SMALLEST) / LARGEST[dtype]
    scaled = (padded / scale[..., None]).view(rows, groups * group)[:, :width].clamp(-LARGEST[dtype], LARGEST[dtype])
    return (torch.floor(scaled + 0.5) if dtype == torch.int8 else scaled).to(dtype), scale


def dequantize(q: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """What ``quantize`` stands for, in fp32."""
    return q.float() * scale.repeat_interleave(group, dim=1)[:, : q.shape[1]]


def check(x: torch.Tensor, dtype: torch.dtype, group: int) -> None:
    """Checks what every implementation relies on.

    Raises:
        ValueError: shapes or the dtype do not fit.
    """
    if dtype not in LARGEST:
        raise ValueError(f"dtype {dtype}: want float8_e4m3fn or int8")
    if x.dim() != 2 or x.shape[1] == 0 or group < 1:
        raise ValueError(f"x {tuple(x.shape)}, group {group}: want (R, W) with W above 0, and a group of at least 1")
