"""What ``rotary_`` means."""

from __future__ import annotations

import torch


def rotary_(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, dim: int) -> torch.Tensor:
    """Turns the first numbers of each head, in place and in fp32: number i and number i + half, by the i-th angle.

    Args:
        x: ``(T, heads * dim)``, bf16 or fp32; tokens may lie apart.
        positions: ``(T,)`` integers, rows of ``table``.
        table: ``(positions, 2 * half)`` fp32: cosines, then sines, with ``2 * half <= dim``.
        dim: numbers of a head.

    Returns:
        ``x``.

    Raises:
        ValueError: shapes do not fit.
    """
    check(x, positions, table, dim)
    half = table.shape[1] // 2
    heads = x.view(x.shape[0], x.shape[1] // dim, dim)
    cosine, sine = (part[:, None] for part in table[positions.long()].chunk(2, dim=-1))
    low, high = heads[..., :half].float(), heads[..., half : 2 * half].float()
    turned = torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)
    heads[..., : 2 * half] = turned.to(x.dtype)
    return x


def check(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, dim: int) -> None:
    """Checks shapes.

    Raises:
        ValueError: they do not fit.
    """
    if x.dim() != 2 or x.shape[1] % dim or positions.shape != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)} and positions {tuple(positions.shape)} are not T rows of heads of {dim}")
    if table.dim() != 2 or table.shape[1] % 2 or table.shape[1] > dim or table.dtype != torch.float32:
        raise ValueError(
            f"table {tuple(table.shape)} {table.dtype}: want fp32 rows of at most {dim} numbers, evenly many"
        )
