"""The disk under the Batch API: how much of it may be used, a reserve for deletes, and what its errors mean."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from asyncep_sgl.front.batches.records import ApiError

logger = logging.getLogger("asyncep")

_BALLAST_BYTES = 4 << 20
# So much of it is given up at a time, so that it serves more than one delete; a transaction takes some 50 kB.
_STEPS = 16
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Less than a page and what belongs to it: SQLite then reports a full disk as an input/output error.
_FULL_BELOW = 1 << 16


class DiskError(ApiError):
    """The state could not be read or written. Another try may succeed."""


class NoSpace(DiskError):
    """The disk is full, or only what is never used is left of it."""

    def __init__(self, message: str = "the server's disk is full; delete files, or make space for it") -> None:
        super().__init__(507, message, code="no_space")


class Damaged(DiskError):
    """The database is not what was written."""

    def __init__(self) -> None:
        super().__init__(
            503,
            "state.sqlite in the server's --asyncep-batch-dir is damaged; move it away or restore it, and start again",
            code="damaged_state",
        )


class Disk:
    """The file system of a folder.

    Args:
        folder: is there.
        floor: bytes that are never used; None takes the smaller of 1 GB and a twentieth.
    """

    def __init__(self, folder: Path, floor: int | None = None) -> None:
        self._folder, self._floor = folder, floor
        self._ballast = folder / "ballast"

    def room(self) -> int:
        """Bytes that may still be used; below 0 where others have taken some of what is never used."""
        found = os.statvfs(self._folder)
        floor = self._floor
        if floor is None:
            floor = min(10**9, found.f_blocks * found.f_frsize // 20)
        # Space of the reserve is the reserve's, also while it is given up.
        reserve = _reserve(found) - self._kept()
        return found.f_bavail * found.f_frsize - floor - reserve

    def need(self, size: int) -> None:
        """Sees that so many bytes may be written.

        Raises:
            NoSpace: they may not.
        """
        if size > (room := self.room()):
            raise NoSpace(
                f"{size} bytes are to be written to the server's disk and {max(0, room)} may be used "
                "(--asyncep-disk-floor); delete files, or make space for --asyncep-batch-dir"
            )

    def release(self) -> bool:
        """Gives up some of the reserve, for what has to succeed on a full disk; False if there is none."""
        if not (kept := self._kept()):
            return False
        left = kept - _reserve(os.statvfs(self._folder)) // _STEPS
        try:
            if left > 0:
                os.truncate(self._ballast, left)
                return True
        except OSError:
            # A file system that needs space to make a file shorter.
            logger.debug("the reserve cannot be given up in part; all of it is")
        self._ballast.unlink(missing_ok=True)
        return True

    def restore(self) -> None:
        """Sets aside what is missing of the reserve, where there is space for it."""
        found = os.statvfs(self._folder)
        size = _reserve(found)
        if self._kept() >= size or found.f_bavail * found.f_frsize < 4 * size:
            return
        # Others may be faster: what cannot be had now is had later.
        with contextlib.suppress(OSError):
            descriptor = os.open(self._ballast, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
            finally:
                os.close(descriptor)

    def _kept(self) -> int:
        """Bytes of the reserve that are set aside."""
        try:
            return self._ballast.stat().st_size
        except FileNotFoundError:
            return 0

    def read(self, error: Exception) -> DiskError:
        """What an error of SQLite or the operating system means."""
        if isinstance(error, DiskError):
            return error
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return NoSpace()
        code = getattr(error, "sqlite_errorcode", None)
        if isinstance(error, sqlite3.Error) and code is not None:
            # The lower byte is the kind, the rest says more of it.
            kind = code & 0xFF
            found = os.statvfs(self._folder)
            full = found.f_bavail * found.f_frsize < _FULL_BELOW
            if kind == sqlite3.SQLITE_FULL or (kind in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and full):
                return NoSpace()
            if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                return Damaged()
        logger.error("the state of batches in %s: %s: %s", self._folder, type(error).__name__, error)
        return DiskError(503, "the server cannot use its --asyncep-batch-dir; its log says why", code="disk_error")

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Errors of SQLite and the operating system leave as what they mean.

        Raises:
            DiskError: instead of them.
        """
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise  # our own fault, which no other try mends
        except (sqlite3.Error, OSError) as error:
            raise self.read(error) from error


def _reserve(found: os.statvfs_result) -> int:
    return min(_BALLAST_BYTES, found.f_blocks * found.f_frsize // 16)
