"""Whether SGLang should run on the plain-CPU platform. The entry point SGLang calls in every process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PLATFORM_VARIABLE = "ASYNCEP_PLATFORM"
# What drivers of accelerators create: NVIDIA, AMD, Intel, Huawei, Moore Threads, Habana and others.
_DEVICE_NODES = ("nvidia*", "dxg", "kfd", "dri/renderD*", "davinci*", "mtgpu*", "accel*")
CPU_PLATFORM = "asyncep_sgl.platform.cpu.AnyCpuPlatform"


def activate() -> str | None:
    """Name of the platform class, or None where SGLang's own platforms serve better.

    ``ASYNCEP_PLATFORM`` decides when set: ``cpu`` takes the plain-CPU platform even beside an accelerator,
    ``off`` never takes it. Unset or ``auto`` takes it only where no accelerator is found and the operator did
    not ask for SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``, which needs AMX builds).
    """
    choice = os.environ.get(PLATFORM_VARIABLE, "auto").strip().lower() or "auto"
    if choice == "cpu":
        return CPU_PLATFORM
    if choice == "off":
        return None
    if choice != "auto":
        # SGLang logs what a plug-in raises and goes on without it; a wrong value must stop the start instead.
        raise SystemExit(f"{PLATFORM_VARIABLE}={choice!r} is not one of auto, cpu, off")
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or accelerator_present():
        return None
    return CPU_PLATFORM


def accelerator_present() -> bool:
    """True when torch sees a device that SGLang has a platform of its own for."""
    if sys.platform == "linux" and not any(any(Path("/dev").glob(nodes)) for nodes in _DEVICE_NODES):
        # torch costs seconds and half a gigabyte, and could not find what the kernel does not have.
        return False
    import torch

    probes = (
        torch.cuda.is_available,
        torch.xpu.is_available,
        torch.backends.mps.is_available,
        lambda: hasattr(torch, "npu") and torch.npu.is_available(),
        lambda: getattr(torch.version, "musa", None) is not None,
    )
    return any(bool(probe()) for probe in probes)
