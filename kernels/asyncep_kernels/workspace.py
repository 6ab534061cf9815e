"""Scratch memory that operations keep between calls: a fresh large allocation costs a page fault per 4 KiB."""

from __future__ import annotations

import math

import torch


class Workspace:
    """Named buffers that only grow. A tensor it hands out is valid until the same name is asked for again.

    One caller at a time: two threads computing at once need a workspace each.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """An uninitialised contiguous tensor."""
        device = torch.device(device)
        numel = math.prod(shape)
        buffer = self._buffers.get((name, dtype, device))
        if buffer is None or buffer.numel() < numel:
            buffer = torch.empty(numel, dtype=dtype, device=device)
            self._buffers[name, dtype, device] = buffer
        return buffer[:numel].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
