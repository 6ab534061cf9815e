"""What the kernel says of another process of this user."""

from __future__ import annotations

import os
import signal
from pathlib import Path


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


def _fields(pid: int) -> list[str]:
    """Of ``/proc/PID/stat``, from the state on; none if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    # The name before may hold spaces and brackets.
    return text.rpartition(")")[2].split()
