"""A private folder for a run's sockets and temporary files; goes with the run, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from asyncep_sgl.errors import UsageError

logger = logging.getLogger("asyncep")

_PREFIX = "asyncep-run-"
_LOCK = "owner.lock"
# A Unix socket's path is limited to 107 bytes; SGLang appends about 20 to ours.
_LONGEST_BASE = 60


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """Makes the folder, removes those of dead runs, and removes its own at the end.

    A run holds a lock on a file in its folder. The kernel drops the lock however the run ends, so a folder whose lock
    can be had belongs to nobody.

    Raises:
        UsageError: the folder cannot be kept from other users.
    """
    base = _base()
    _remove_stale(base)
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        lock = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / _LOCK).exists():
            break
        # Another start took the folder for a dead run's before it was locked.
        os.close(lock)
    try:
        check_private(directory)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def check_private(directory: Path) -> None:
    """Sees that no other user can read or enter ``directory``.

    Raises:
        UsageError: one can, with the fix.
    """
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise UsageError(f"{directory}: other users can enter it; set TMPDIR to a folder whose file system keeps modes")


def replaceable(folder: Path) -> bool:
    """Whether any user may put a folder of his own in the place of one in ``folder``."""
    for each in (folder, *folder.parents):
        mode = each.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return True
    return False


def _base() -> Path:
    """The folder for temporary files, or another where that one's path is too long for sockets or open to changes."""
    told = Path(tempfile.gettempdir()).absolute()
    others = [os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/dev/shm"]
    folders = [told, *(Path(folder) for folder in others if folder)]
    fitting = [folder for folder in folders if len(os.fsencode(folder)) <= _LONGEST_BASE and os.access(folder, os.W_OK)]
    for folder in fitting:
        if not replaceable(folder):
            return folder
    logger.warning("any user may replace folders in %s; set TMPDIR to one that is sticky (chmod +t) or yours", told)
    return fitting[0] if fitting else Path("/tmp")


def _remove_stale(base: Path) -> None:
    for directory in base.glob(f"{_PREFIX}*"):
        try:
            found = directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                # Another user's, which may hold what would keep this start waiting.
                continue
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            # A run that has not made its lock yet, or that has just ended.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
