"""The lines that call torch.cuda and the driver, on the real bindings' types and signatures, without a device.

What a device would do with the calls is not shown here; which calls are made, in which order, with arguments that the
bindings take, is.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from cuda.bindings import driver

from asyncep_sgl.errors import GatherError, StoreError
from asyncep_sgl.experts.gather.device import Copy, TorchDevice
from asyncep_sgl.experts.sources.device_memory import CudaMemory, Piece

GRANULE = 1 << 21
OK = driver.CUresult.CUDA_SUCCESS
REFUSED = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
NO_DRIVER = not os.path.exists("/proc/driver/nvidia")


class Driver:
    """The driver's bindings, its functions answered here and written down."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.calls: list[tuple[Any, ...]] = []
        self.handles = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(driver, name)
        if not name.startswith("cu"):
            return real

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == self.refuses:
                return REFUSED, 0
            if name in ("cuMemCreate", "cuMemImportFromShareableHandle"):
                self.handles += 1
                return OK, driver.CUmemGenericAllocationHandle(self.handles)
            if name == "cuMemExportToShareableHandle":
                return OK, 77
            answers = {
                "cuMemGetAllocationGranularity": GRANULE,
                "cuMemAddressReserve": driver.CUdeviceptr(GRANULE * 64),
            }
            return (OK, answers[name]) if name in answers else (OK,)

        return call

    @property
    def named(self) -> list[str]:
        return [call[0] for call in self.calls]


def memory(monkeypatch: pytest.MonkeyPatch, refuses: str = "") -> tuple[CudaMemory, Driver]:
    from sglang.srt.utils import cuda_vmm_utils as vmm

    fake = Driver()
    monkeypatch.setattr(vmm, "_drv", fake)

    def on_the_host(pointer: int, nbytes: int, *, device_id: int) -> Any:
        return SimpleNamespace(data_ptr=lambda: pointer, nbytes=nbytes, device=device_id)

    monkeypatch.setattr(vmm, "tensor_from_pointer", on_the_host)
    made = CudaMemory(1)
    fake.refuses = refuses
    fake.calls.clear()
    return made, fake


def test_memory_is_made_for_export_and_kept_by_its_descriptor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = memory(monkeypatch)
    assert made.granularity == GRANULE
    assert made.allocate(3 * GRANULE) == 77
    assert calls.named == ["cuMemCreate", "cuMemExportToShareableHandle", "cuMemRelease"]
    properties = calls.calls[0][2]
    posix = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    assert properties.requestedHandleTypes == posix
    assert properties.location.id == 1
    assert calls.calls[1][2] == posix


def test_pieces_are_mapped_where_they_belong_for_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = memory(monkeypatch)
    descriptor = os.memfd_create("piece")
    mapped = made.map(5 * GRANULE - 9, [Piece(2 * GRANULE, GRANULE, descriptor)], writable=True)
    assert mapped.nbytes == 5 * GRANULE - 9
    wanted = ["cuMemAddressReserve", "cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess", "cuMemRelease"]
    assert calls.named == wanted
    assert calls.calls[0][1] == 5 * GRANULE
    assert calls.calls[2][1:3] == (mapped.data_ptr() + 2 * GRANULE, GRANULE)
    assert access(calls.calls[3]) == driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    made.protect(mapped)
    assert calls.calls[-1][1:3] == (mapped.data_ptr() + 2 * GRANULE, GRANULE)
    assert access(calls.calls[-1]) == driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    os.fstat(descriptor)  # still the caller's
    os.close(descriptor)


def access(call: tuple[Any, ...]) -> Any:
    (description,) = call[3]
    assert description.location.id == 1
    return description.flags


def test_a_peers_memory_is_read_only_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = memory(monkeypatch)
    descriptor = os.memfd_create("piece")
    made.map(GRANULE, [Piece(0, GRANULE, descriptor)], writable=False)
    os.close(descriptor)
    assert access(calls.calls[-1]) == driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ


def test_refusals_name_the_fix(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    made, _ = memory(monkeypatch, refuses="cuMemCreate")
    with pytest.raises(StoreError, match=r"device 1 gave no 5 bytes .*--asyncep-transport pinned"):
        made.allocate(5)
    descriptor = os.memfd_create("piece")
    made, _ = memory(monkeypatch, refuses="cuMemMap")
    with pytest.raises(StoreError, match=r"cannot be mapped on device 1 .*--asyncep-transport pinned"):
        made.map(GRANULE, [Piece(0, GRANULE, descriptor)], writable=False)
    made, calls = memory(monkeypatch)
    mapped = made.map(GRANULE, [Piece(0, GRANULE, descriptor)], writable=True)
    calls.refuses = "cuMemSetAccess"
    made.protect(mapped)
    assert "does not map experts read-only" in caplog.text
    os.close(descriptor)


def bytes_of(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.uint8)


def test_streams_and_events_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, event = create_autospec(torch.cuda.Stream, instance=True), create_autospec(torch.cuda.Event, instance=True)
    event.elapsed_time.return_value = 250.0
    make_stream, make_event = create_autospec(torch.cuda.Stream), create_autospec(torch.cuda.Event)
    make_stream.return_value, make_event.return_value = stream, event
    monkeypatch.setattr(torch.cuda, "Stream", make_stream)
    monkeypatch.setattr(torch.cuda, "Event", make_event)
    monkeypatch.setattr(torch.cuda, "current_stream", create_autospec(torch.cuda.current_stream, return_value=stream))
    device = TorchDevice(1)
    assert device.current_stream() is stream
    assert device.new_stream() is stream
    make_stream.assert_called_with(torch.device("cuda", 1))
    assert device.record(stream) is event
    event.record.assert_called_once_with(stream)
    make_event.assert_called_with(enable_timing=True)
    device.wait(stream, event)
    stream.wait_event.assert_called_once_with(event)
    assert device.seconds(event, event) == 0.25
    event.synchronize.assert_called_once_with()
    device.synchronize(stream)
    stream.synchronize.assert_called_once_with()
    entered = create_autospec(torch.cuda.stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    device.on(stream)
    entered.assert_called_once_with(stream)


def test_host_memory_is_pinned_through_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    answer = [0]

    def register(address: int, nbytes: int, flags: int) -> int:
        asked.append((address, nbytes, flags))
        return answer[0]

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    memory = bytes_of(4096)
    TorchDevice(0).pin(memory)
    assert asked == [(memory.data_ptr(), 4096, 0)]
    answer[0] = 2
    with pytest.raises(GatherError, match=r"4096 bytes of host memory cannot be pinned \(CUDA error 2\); raise"):
        TorchDevice(0).pin(memory)


def test_a_layers_slices_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = [Copy(bytes_of(64), bytes_of(64)), Copy(bytes_of(16), bytes_of(16))]
    calls: list[tuple[Any, ...]] = []
    answer = [OK]

    def batch(*arguments: Any) -> tuple[Any, ...]:
        calls.append(arguments)
        return (answer[0],)

    device, stream = TorchDevice(0), SimpleNamespace(cuda_stream=0)
    prepared = device.prepare(copies)
    if NO_DRIVER:
        # Arguments are converted before the driver is looked for: the bindings take what they are given.
        with pytest.raises(Exception, match="NVIDIA driver library"):
            device.copy(stream, prepared)
    monkeypatch.setattr(driver, "cuMemcpyBatchAsync", batch)
    device.copy(stream, prepared)
    targets, sources, sizes, count, attributes, starts, kinds, _ = calls[0]
    assert [int(target) for target in targets] == [copy.target.data_ptr() for copy in copies]
    assert [int(source) for source in sources] == [copy.source.data_ptr() for copy in copies]
    assert (sizes, count, starts, kinds) == ([64, 16], 2, [0], 1)
    order = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    assert attributes[0].srcAccessOrder == order
    device.copy(stream, device.prepare([]))
    assert len(calls) == 1
    answer[0] = REFUSED
    with pytest.raises(GatherError, match="a copy of 2 slices was refused"):
        device.copy(stream, prepared)
