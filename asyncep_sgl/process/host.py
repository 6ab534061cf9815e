"""What this host has to give: memory and CPUs, as far as control groups let us have them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

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
    for group in _memory_groups():
        try:
            limit = (group.folder / group.limit).read_text().strip()
            if limit == "max":
                continue
            used = int((group.folder / group.used).read_text())
            # Clean page cache counts as used but gives way.
            for line in (group.folder / "memory.stat").read_text().splitlines():
                if line.startswith(f"{group.cache} "):
                    used -= int(line.split()[1])
        except (OSError, ValueError):
            continue
        available = min(available, max(0, int(limit) - used))
    return available


class _MemoryGroup(NamedTuple):
    """A control group, and what its version calls the files of limit and use and the line of the page cache."""

    folder: Path
    limit: str
    used: str
    cache: str


def _memory_groups() -> list[_MemoryGroup]:
    """This process's control groups (version 2, and 1 where memory is in it) and their ancestors."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _CGROUP, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUP / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        found += [_MemoryGroup(folder, *names) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return found


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
