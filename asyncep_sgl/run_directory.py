"""A private folder for a run's temporary files; goes with the run or, after a kill -9, with the next start."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "asyncep-run-"
_LOCK = "owner.lock"
# A Unix socket's path is limited to 107 bytes; SGLang appends about 20 to ours.
_LONGEST_BASE = 60


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """Makes the folder, removes those of dead runs, and removes its own at the end.

    A run holds a lock on a file in its folder. The kernel drops the lock however the run ends, so a folder whose lock
    can be had belongs to nobody.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base)) > _LONGEST_BASE:
        base = Path("/tmp")
    _remove_stale(base)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    lock = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _remove_stale(base: Path) -> None:
    for directory in base.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(directory / _LOCK, os.O_RDWR)
        except OSError:
            # Another user's, or a run that has not made its lock yet.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
