"""What the gathers need of an accelerator: streams, events, copies. A small interface, so that a test can stand in.

`TorchDevice` is the real one. It has not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

from asyncep_sgl.errors import GatherError

Stream = Any
"""Work queued on one is done in order. Compared by ``==``."""
Event = Any
"""A point in a stream."""


class Copy(NamedTuple):
    """Bytes to move: two uint8 tensors ``(n,)``."""

    target: torch.Tensor
    source: torch.Tensor


class Device(Protocol):
    """One accelerator, as one process sees it. Nothing here waits on the host unless it says so."""

    def current_stream(self) -> Stream:
        """The one that the forward pass is queued on now."""

    def new_stream(self) -> Stream:
        """A side stream."""

    def record(self, stream: Stream) -> Event:
        """Marks what has been queued on ``stream`` so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What is queued on ``stream`` from now on begins after ``event``."""

    def prepare(self, copies: Sequence[Copy]) -> Any:
        """Copies that will be queued together, again and again. No two targets overlap."""

    def copy(self, stream: Stream, prepared: Any) -> None:
        """Queues prepared copies, in any order among themselves.

        Raises:
            GatherError: refused; some may have been queued.
        """

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """Libraries queue on ``stream`` meanwhile."""

    def seconds(self, earlier: Event, later: Event) -> float:
        """Between two events. Waits on the host for ``later``: for measurements, and for events long past."""

    def synchronize(self, stream: Stream) -> None:
        """Waits on the host until ``stream`` is empty."""

    def pin(self, memory: torch.Tensor) -> None:
        """Makes host memory one that copy engines read without a detour.

        Raises:
            GatherError: the memory cannot be locked.
        """


class TorchDevice:
    """A CUDA device through torch, and the driver's batched copy: one call for the thousand slices of a layer."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)

    def current_stream(self) -> Stream:
        """See `Device`."""
        return torch.cuda.current_stream(self._device)

    def new_stream(self) -> Stream:
        """See `Device`."""
        return torch.cuda.Stream(self._device)

    def record(self, stream: Stream) -> Event:
        """See `Device`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        """See `Device`."""
        stream.wait_event(event)

    def prepare(self, copies: Sequence[Copy]) -> Any:
        """See `Device`."""
        from cuda.bindings import driver

        attributes = driver.CUmemcpyAttributes()
        # A source may be read when the stream gets there, not before: peers write it only while they load.
        attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        attributes.flags = int(driver.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE)
        targets = [driver.CUdeviceptr(copy.target.data_ptr()) for copy in copies]
        sources = [driver.CUdeviceptr(copy.source.data_ptr()) for copy in copies]
        return targets, sources, [copy.target.nbytes for copy in copies], attributes

    def copy(self, stream: Stream, prepared: Any) -> None:
        """See `Device`."""
        from cuda.bindings import driver

        targets, sources, sizes, attributes = prepared
        if not sizes:
            return
        result = driver.cuMemcpyBatchAsync(
            targets, sources, sizes, len(sizes), [attributes], [0], 1, driver.CUstream(stream.cuda_stream)
        )[0]
        if result != driver.CUresult.CUDA_SUCCESS:
            raise GatherError(f"a copy of {len(sizes)} slices was refused: {result}")

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """See `Device`."""
        context: AbstractContextManager[Any] = torch.cuda.stream(stream)
        return context

    def seconds(self, earlier: Event, later: Event) -> float:
        """See `Device`."""
        later.synchronize()
        return float(earlier.elapsed_time(later)) / 1e3

    def synchronize(self, stream: Stream) -> None:
        """See `Device`."""
        stream.synchronize()

    def pin(self, memory: torch.Tensor) -> None:
        """See `Device`."""
        result = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if result != 0:
            raise GatherError(
                f"{memory.nbytes} bytes of host memory cannot be pinned (CUDA error {result}); raise the locked-memory "
                "limit (ulimit -l) or keep fewer experts on the host with --asyncep-expert-memory"
            )
