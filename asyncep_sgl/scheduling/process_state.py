"""What the kernel says about a process that does not answer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

# Stopped by a signal or a debugger.
_STOPPED = frozenset("Tt")


class ProcessState(NamedTuple):
    """One look at a process.

    Attributes:
        stopped: all its threads are stopped.
        waits_for_cpu: a thread could run: it does, or has no processor.
        ticks: processor time used, in the kernel's ticks.
    """

    stopped: bool
    waits_for_cpu: bool
    ticks: int


def process_state(pid: int) -> ProcessState | None:
    """Looks; None if the process is gone."""
    states = set()
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            states.add(_fields(task / "stat")[0])
        fields = _fields(Path(f"/proc/{pid}/stat"))
    except OSError:
        return None
    return ProcessState(states <= _STOPPED, "R" in states, int(fields[11]) + int(fields[12]))


def stuck(before: ProcessState, now: ProcessState) -> bool:
    """Whether a process that has been silent did nothing in between, and not for want of a processor."""
    return now.stopped or (not now.waits_for_cpu and now.ticks == before.ticks)


def _fields(stat: Path) -> list[str]:
    # After the name, which is in brackets and may hold anything.
    return stat.read_text().rpartition(")")[2].split()
