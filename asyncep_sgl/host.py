"""What this host has to give: memory and CPUs, as far as control groups let us have them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")

# What a process that computes wants of its libraries, as environment variables.
COMPUTING = {
    # oneDNN compiles a kernel for each shape it meets and forgets the oldest of 1,024; ragged batches have more.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",
    # glibc gives blocks of some MB back to the kernel when they are freed, and taking them anew costs a page fault for
    # each 4 KiB: more than most operators take.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}


def available_bytes() -> int:
    """Memory that can still be taken without swapping: the host's, or the control group's where that is less."""
    available = int(psutil.virtual_memory().available)
    for directory in _memory_groups():
        try:
            limit = (directory / "memory.max").read_text().strip()
            if limit == "max":
                continue
            used = int((directory / "memory.current").read_text())
            # Clean page cache counts as used but gives way.
            for line in (directory / "memory.stat").read_text().splitlines():
                if line.startswith("inactive_file "):
                    used -= int(line.split()[1])
        except (OSError, ValueError):
            continue
        available = min(available, max(0, int(limit) - used))
    return available


def _memory_groups() -> list[Path]:
    """This process's control group (version 2) and its ancestors."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        if line.startswith("0::"):
            group = _CGROUP / line[3:].lstrip("/")
            return [group, *[p for p in group.parents if p.is_relative_to(_CGROUP)]]
    return []


def divide_cpus(ranks: int, cpus: list[int] | None = None) -> tuple[tuple[int, ...], ...]:
    """A run of CPUs for each rank, equal up to one; with fewer CPUs than ranks they are shared in turn.

    Args:
        ranks: how many parts, at least 1.
        cpus: the CPUs to divide; this process's own by default.
    """
    have = sorted(os.sched_getaffinity(0)) if cpus is None else cpus
    if len(have) < ranks:
        return tuple((have[rank % len(have)],) for rank in range(ranks))
    base, extra = divmod(len(have), ranks)
    parts, start = [], 0
    for rank in range(ranks):
        stop = start + base + (rank < extra)
        parts.append(tuple(have[start:stop]))
        start = stop
    return tuple(parts)


def format_bytes(nbytes: float) -> str:
    """``1536`` → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
