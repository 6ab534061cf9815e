"""An expert table as a GPU reads it: addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from asyncep_kernels.moe.quant import Format
from asyncep_kernels.moe.table import ExpertTable

# Kernels read 16 bytes at once.
ALIGNMENT = 16


class PointerTable(NamedTuple):
    """The addresses of one layer's experts in the device's memory; made once, not per batch.

    It does not own what it points to: slots must hold a layer's experts until the kernels of that layer are done.
    """

    w13: torch.Tensor
    """``(E,)`` int64, as the others."""
    w2: torch.Tensor
    w13_scale: torch.Tensor | None
    w2_scale: torch.Tensor | None
    dtype: torch.dtype
    """Of the weights."""
    hidden: int
    inter: int

    @property
    def experts(self) -> int:
        """E."""
        return int(self.w13.numel())

    @property
    def format(self) -> Format:
        """How the weights are stored."""
        return Format.of(self.dtype)


def pointer_table(experts: ExpertTable, device: torch.device | str | None = None) -> PointerTable:
    """Addresses of the entries of a table that `asyncep_kernels.moe.table.check` accepts.

    Args:
        experts: entries contiguous, at addresses divisible by 16, readable by ``device`` (its own memory, a peer's
            mapped into it, or pinned host memory).
        device: where the addresses go; the first entry's when absent.

    Raises:
        ValueError: an entry is not contiguous or not aligned.
    """
    w13, w2 = experts.entries()
    w13_scale, w2_scale = experts.scales()
    target = torch.device(device) if device is not None else w13[0].device
    return PointerTable(
        _addresses("w13", w13, target),
        _addresses("w2", w2, target),
        None if w13_scale is None else _addresses("w13_scale", w13_scale, target),
        None if w2_scale is None else _addresses("w2_scale", w2_scale, target),
        w13[0].dtype,
        w13[0].shape[1],
        w2[0].shape[1],
    )


def _addresses(name: str, entries: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    aligned = ALIGNMENT if not name.endswith("scale") else 4
    for expert, entry in enumerate(entries):
        if not entry.is_contiguous() or entry.data_ptr() % aligned:
            raise ValueError(f"{name}[{expert}]: must be contiguous, at an address divisible by {aligned}")
    return torch.tensor([entry.data_ptr() for entry in entries], dtype=torch.int64).to(device, non_blocking=True)
