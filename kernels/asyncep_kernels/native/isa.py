"""Which instruction set the C kernels use on this machine."""

from __future__ import annotations

import ctypes
import os
import platform
from enum import Enum
from pathlib import Path

ENVIRONMENT = "ASYNCEP_CPU_ISA"

# Linux asks a process to request the 8 KiB of tile registers before it uses them (arch_prctl, x86-64).
_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_TILE_DATA = 18


class Isa(Enum):
    """Value: what `ASYNCEP_CPU_ISA` calls it."""

    AMX = "amx"
    AVX512_BF16 = "avx512_bf16"
    NONE = "none"
    """No C kernels: torch's operators serve."""

    @property
    def compiler_flags(self) -> tuple[str, ...]:
        """What the C compiler is told."""
        if self is Isa.AMX:
            return ("-mcpu=sapphirerapids", "-DASYNCEP_AMX")
        return ("-mcpu=cooperlake",)


def choose() -> Isa:
    """The best this machine has, or what ``ASYNCEP_CPU_ISA`` asks for where the machine has it.

    Raises:
        ValueError: the variable's value is none of the three.
    """
    best = _best(_cpu_flags())
    wanted = os.environ.get(ENVIRONMENT)
    if not wanted:
        return best
    names = [isa.value for isa in Isa]
    if wanted not in names:
        raise ValueError(f"{ENVIRONMENT}={wanted} is none of {', '.join(names)}")
    order = list(Isa)
    return max(Isa(wanted), best, key=order.index)


def computes_bf16() -> bool:
    """Whether this CPU has instructions for bf16. Without, torch computes it many times more slowly than fp32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & _cpu_flags())  # the last is what Arm calls it


def allow_tiles() -> bool:
    """Asks the kernel for AMX's tile registers, for all threads of this process; False if it refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_TILE_DATA)) == 0


def _best(flags: frozenset[str]) -> Isa:
    if platform.machine() != "x86_64" or not {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"} <= flags:
        return Isa.NONE
    return Isa.AMX if {"amx_tile", "amx_bf16"} <= flags else Isa.AVX512_BF16


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    listed = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(listed, ()))
