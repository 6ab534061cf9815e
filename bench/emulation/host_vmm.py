"""`device_memory.DeviceMemory` out of the host's: anonymous files for physical memory, reserved addresses for virtual.

As on a device, what has no memory behind it must not be touched (the process would die), descriptors keep memory
whose maker is gone, and what is protected cannot be written.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch

from asyncep_sgl.errors import StoreError
from asyncep_sgl.experts.sources.device_memory import Piece

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class HostMemory:
    """A "device" of ``limit`` bytes."""

    def __init__(self, limit: int = 1 << 40) -> None:
        self.granularity = mmap.PAGESIZE
        self._left = limit
        self._pieces: dict[int, Sequence[Piece]] = {}

    def allocate(self, nbytes: int) -> int:
        assert nbytes % self.granularity == 0
        if nbytes > self._left:
            raise StoreError(f"the device gave no {nbytes} bytes for experts")
        self._left -= nbytes
        descriptor = os.memfd_create("asyncep-device")
        os.ftruncate(descriptor, nbytes)
        return descriptor

    def map(self, extent: int, pieces: Sequence[Piece], *, writable: bool) -> torch.Tensor:
        size = -(-extent // self.granularity) * self.granularity
        base = _mapped(None, size, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
        for piece in pieces:
            assert piece.offset % self.granularity == 0
            assert piece.offset + piece.nbytes <= size
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            _mapped(base + piece.offset, piece.nbytes, protection, mmap.MAP_SHARED | _MAP_FIXED, piece.descriptor)
        self._pieces[base] = pieces
        return torch.frombuffer((ctypes.c_uint8 * extent).from_address(base), dtype=torch.uint8)

    def protect(self, mapped: torch.Tensor) -> None:
        for piece in self._pieces[mapped.data_ptr()]:
            if _libc.mprotect(mapped.data_ptr() + piece.offset, piece.nbytes, mmap.PROT_READ):
                raise OSError(ctypes.get_errno(), "mprotect")


def _mapped(where: int | None, nbytes: int, protection: int, flags: int, descriptor: int) -> int:
    found = _libc.mmap(where, nbytes, protection, flags, descriptor, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return int(found)
