"""What the kernel says of another process of this user."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

# Stopped by a signal or a debugger.
_STOPPED = frozenset("Tt")


def how_it_ended(pid: int) -> str:
    """How process ``pid``, which has ended, did so: as words that follow its name.

    Its status can be read until its parent has taken it; that is soon after, and then it only "ended".
    """
    fields = _fields(pid)
    if not fields or fields[0] not in ("Z", "X"):
        return "ended"
    status = os.waitstatus_to_exitcode(int(fields[-1]))
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def has_ended(pid: int) -> bool:
    """Whether the process is gone, or its first thread is: its others may take a moment more."""
    return _fields(pid)[:1] in ([], ["Z"], ["X"])


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process; one that a debugger holds is not."""
    return _fields(pid)[:1] == ["T"]


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
            states.add(_stat(task / "stat")[0])
        fields = _stat(Path(f"/proc/{pid}/stat"))
    except OSError:
        return None
    return ProcessState(states <= _STOPPED, "R" in states, int(fields[11]) + int(fields[12]))


def stuck(before: ProcessState, now: ProcessState) -> bool:
    """Whether a process that has been silent did nothing in between, and not for want of a processor."""
    return now.stopped or (not now.waits_for_cpu and now.ticks == before.ticks)


def _fields(pid: int) -> list[str]:
    """Of ``/proc/PID/stat``, from the state on; none if there is no such process."""
    try:
        return _stat(Path(f"/proc/{pid}/stat"))
    except OSError:
        return []


def _stat(path: Path) -> list[str]:
    # The name before may hold spaces and brackets.
    return path.read_text().rpartition(")")[2].split()
