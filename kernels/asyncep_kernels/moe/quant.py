"""Quantised experts: what their numbers stand for, and how they are made from bf16."""

from __future__ import annotations

from enum import Enum

import torch

from asyncep_kernels.quantize.reference import LARGEST, SMALLEST

# Side of a square of weights, and elements of an activation row, that share a scale in e4m3.
BLOCK = 128


class Format(Enum):
    """How an expert's weights are stored."""

    PLAIN = "plain"
    """bf16 or fp32, of the hidden states' dtype."""
    FP8 = "fp8"
    """e4m3 with an fp32 scale for each 128 x 128 block; activations with a scale for each 128 elements of a row."""
    INT8 = "int8"
    """int8 with an fp32 scale for each output channel; activations with a scale for each row."""

    @staticmethod
    def of(dtype: torch.dtype) -> Format:
        """The format of weights of ``dtype``."""
        return {torch.float8_e4m3fn: Format.FP8, torch.int8: Format.INT8}.get(dtype, Format.PLAIN)

    def group(self, width: int) -> int:
        """Elements of an activation row of ``width`` that share a scale."""
        return BLOCK if self is Format.FP8 else width

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored numbers.

        Raises:
            ValueError: the format is plain.
        """
        if self is Format.PLAIN:
            raise ValueError("plain experts have the hidden states' dtype")
        return torch.float8_e4m3fn if self is Format.FP8 else torch.int8


def scale_shape(weight: tuple[int, int], form: Format, parts: int) -> tuple[int, int]:
    """Shape of the scales of a ``(rows, columns)`` weight of ``parts`` matrices stacked by rows.

    Blocks do not reach over the border between two parts: gate and up have blocks of their own.
    """
    if form is Format.INT8:
        return (weight[0], 1)
    return (parts * -(-(weight[0] // parts) // BLOCK), -(-weight[1] // BLOCK))


def quantize_weight(weight: torch.Tensor, form: Format, parts: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rows, columns)`` to (numbers, fp32 scales of `scale_shape`)."""
    weight = weight.float()
    if form is Format.INT8:
        scale = weight.abs().amax(1, keepdim=True).clamp(min=SMALLEST) / LARGEST[torch.int8]
        return torch.round(weight / scale).to(torch.int8), scale
    rows, columns = weight.shape[0] // parts, weight.shape[1]
    high, wide = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.nn.functional.pad(
        weight.view(parts, rows, columns), (0, wide * BLOCK - columns, 0, high * BLOCK - rows)
    ).view(parts, high, BLOCK, wide, BLOCK)
    scale = padded.abs().amax((2, 4)).clamp(min=SMALLEST) / LARGEST[torch.float8_e4m3fn]
    numbers = (padded / scale[:, :, None, :, None]).to(torch.float8_e4m3fn)
    numbers = numbers.view(parts, high * BLOCK, wide * BLOCK)[:, :rows, :columns].reshape(weight.shape).contiguous()
    return numbers, scale.view(parts * high, wide)


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor | None, parts: int = 1) -> torch.Tensor:
    """What the numbers stand for, in fp32."""
    if scale is None:
        return weight.float()
    if Format.of(weight.dtype) is Format.INT8:
        return weight.float() * scale
    rows, blocks = weight.shape[0] // parts, scale.shape[0] // parts
    wide = scale.repeat_interleave(BLOCK, dim=1)[:, : weight.shape[1]]
    return weight.float() * torch.cat(
        [wide[p * blocks : (p + 1) * blocks].repeat_interleave(BLOCK, dim=0)[:rows] for p in range(parts)]
    )
