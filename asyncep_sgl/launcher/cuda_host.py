"""The GPUs of this host and what is installed for them, without torch: the launcher never touches a device."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

from asyncep_sgl.errors import UsageError
from asyncep_sgl.launcher.cuda_attention import CudaHost


class Gpu(NamedTuple):
    """One device: its name, compute capability and bytes of memory."""

    name: str
    capability: tuple[int, int]
    memory: int


def find_gpus() -> list[Gpu]:
    """Those a rank may use: NVML's, as ``CUDA_VISIBLE_DEVICES`` leaves them.

    Raises:
        UsageError: no driver answers, or a visible device that there is not.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise UsageError(f"--device cuda: no NVIDIA driver answers ({error}); use --device cpu") from error
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            found.append(Gpu(str(name), (major, minor), int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)))
    finally:
        pynvml.nvmlShutdown()
    return visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(found: list[Gpu], chosen: str | None) -> list[Gpu]:
    """The devices that ``CUDA_VISIBLE_DEVICES`` names by number; all where it is not set or names them by UUID.

    Raises:
        UsageError: a number beyond the last device.
    """
    if chosen is None:
        return found
    numbers = [part.strip() for part in chosen.split(",") if part.strip()]
    if not all(number.isdigit() for number in numbers):
        # UUIDs or MIG slices: as many as are named, and taken to be alike.
        return found[:1] * len(numbers)
    if any(int(number) >= len(found) for number in numbers):
        raise UsageError(f"CUDA_VISIBLE_DEVICES={chosen}: this host has {len(found)} GPUs, numbered from 0")
    return [found[int(number)] for number in numbers]


def installed(gpu: Gpu) -> CudaHost:
    """What `cuda_attention` asks about."""
    return CudaHost(
        gpu.capability,
        flashinfer=importlib.util.find_spec("flashinfer") is not None,
        fa3=importlib.util.find_spec("sgl_kernel") is not None and gpu.capability[0] == 9,
    )
