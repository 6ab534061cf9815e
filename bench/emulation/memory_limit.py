"""A control group that may only take so much memory: what a smaller machine would be."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


class NoControlGroupsError(RuntimeError):
    """This machine does not let us limit memory; the message says why."""


@dataclass(frozen=True)
class MemoryGroup:
    """A control group. Page cache counts, and gives way."""

    folder: Path
    limit: int

    def command(self, command: Sequence[str]) -> list[str]:
        """``command`` within the group."""
        members = self.folder / "cgroup.procs"
        return ["sh", "-c", f'echo $$ > {members} && exec "$@"', "sh", *command]


@contextlib.contextmanager
def memory_limit(nbytes: int) -> Iterator[MemoryGroup]:
    """A control group that may take ``nbytes``; removed afterwards.

    Raises:
        NoControlGroupsError: no right to make one.
    """
    old = (_ROOT / "memory").is_dir()
    folder = (_ROOT / "memory" if old else _ROOT) / f"asyncep-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(nbytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise NoControlGroupsError(
            f"{folder}: {error.strerror}; limiting memory needs root and control groups"
        ) from error
    try:
        yield MemoryGroup(folder, nbytes)
    finally:
        # The kernel takes a moment to let go of the last process.
        for _ in range(50):
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)
