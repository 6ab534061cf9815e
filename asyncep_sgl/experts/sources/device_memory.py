"""Device memory that outlives the process that made it: a descriptor stands for it, and whoever holds one keeps it.

CUDA's virtual memory management: physical memory is made once, exported as a file descriptor, and mapped wherever it
is needed, in this process or another, on this device or a peer. "The memory allocation will be freed when all
outstanding mappings to the memory are unmapped and when all outstanding references to the handle (including it's
shareable counterparts) are also released" (cuMemRelease): so the launcher, which has no CUDA, keeps the experts by
holding descriptors. CUDA IPC, which torch shares tensors by, frees memory with its maker.

`CudaMemory` has not run on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from asyncep_sgl.errors import StoreError

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Physical memory at an address: ``nbytes`` from ``offset`` on, both multiples of the granularity."""

    offset: int
    nbytes: int
    descriptor: int


class DeviceMemory(Protocol):
    """Memory of one device, as this process maps it."""

    granularity: int
    """Bytes of which offsets and sizes are multiples."""

    def allocate(self, nbytes: int) -> int:
        """A descriptor of new memory. The caller closes it.

        Raises:
            StoreError: none left.
        """

    def map(self, extent: int, pieces: Sequence[Piece], *, writable: bool) -> torch.Tensor:
        """uint8 ``(extent,)`` with the pieces in place; what lies between must not be touched.

        It stays mapped until the process ends. Descriptors may be closed afterwards.

        Raises:
            StoreError: the memory cannot be mapped, or not for this device.
        """

    def protect(self, mapped: torch.Tensor) -> None:
        """Makes what `map` returned read-only from now on, in hardware where the device can."""


class CudaMemory:
    """Of a CUDA device. SGLang's DWDP helpers do the driver's calls where they fit."""

    def __init__(self, index: int) -> None:
        from sglang.srt.utils import cuda_vmm_utils as vmm

        self._vmm: Any = vmm
        self._index = index
        driver = vmm._get_cuda_driver()
        posix = int(driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
        self._handle_type = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._properties = vmm.make_device_allocation_prop(index, handle_types=posix)
        self.granularity = vmm.get_allocation_granularity(self._properties)
        # Mappings end with the process: tensors on them have no way to tell when they are done.
        self._mapped: dict[int, tuple[Any, Sequence[Piece]]] = {}

    def allocate(self, nbytes: int) -> int:
        """See `DeviceMemory`."""
        driver, check = self._vmm._get_cuda_driver(), self._vmm.check_drv
        try:
            handle = check(driver.cuMemCreate(nbytes, self._properties, 0), "cuMemCreate")
            exported = check(driver.cuMemExportToShareableHandle(handle, self._handle_type, 0), "export")
            check(driver.cuMemRelease(handle), "cuMemRelease")
        except RuntimeError as error:
            raise StoreError(
                f"device {self._index} gave no {nbytes} bytes for experts ({error}); use more ranks (--dp-size), or "
                "keep experts in host memory with --asyncep-transport pinned"
            ) from error
        return int(exported)

    def map(self, extent: int, pieces: Sequence[Piece], *, writable: bool) -> torch.Tensor:
        """See `DeviceMemory`."""
        driver, check = self._vmm._get_cuda_driver(), self._vmm.check_drv
        size = self._vmm.align_up(extent, self.granularity)
        try:
            reservation = self._vmm.VmmReservation(size, self._properties, self._index, alignment=self.granularity)
            for piece in pieces:
                handle = self._vmm.import_peer_handle(None, piece.descriptor, use_fabric=False, peer_rank=0)
                reservation.map_existing(piece.offset, piece.nbytes, handle)
                check(driver.cuMemRelease(handle), "cuMemRelease")
        except RuntimeError as error:
            raise StoreError(
                f"experts of another process cannot be mapped on device {self._index} ({error}); GPUs that cannot "
                "reach each other's memory are served with --asyncep-transport pinned"
            ) from error
        self._mapped[reservation.base] = (reservation, tuple(pieces))
        tensor: torch.Tensor = self._vmm.tensor_from_pointer(reservation.base, extent, device_id=self._index)
        if not writable:
            self.protect(tensor)
        return tensor

    def protect(self, mapped: torch.Tensor) -> None:
        """See `DeviceMemory`."""
        reservation, pieces = self._mapped[mapped.data_ptr()]
        for piece in pieces:
            self._forbid_writing(reservation.base + piece.offset, piece.nbytes)

    def _forbid_writing(self, address: int, nbytes: int) -> None:
        driver = self._vmm._get_cuda_driver()
        access = self._vmm.make_rw_access_desc(self._index)
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        result = driver.cuMemSetAccess(address, nbytes, [access], 1)[0]
        if result != driver.CUresult.CUDA_SUCCESS:
            logger.warning("device %d does not map experts read-only: %s", self._index, result)
