"""Shared memory without a name: it lives in one process's descriptors and is gone when the last process is."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence


class OwnedSegment:
    """Memory that is held through a descriptor of an anonymous file (memfd): by the launcher, unless stated.

    Nothing appears in ``/dev/shm``, so no crash can leave anything behind there, two servers cannot collide, and
    a container's ``--shm-size`` does not limit it.
    """

    def __init__(self, name: str, nbytes: int, spans: Sequence[range] | None = None) -> None:
        """Reserves memory now, so that running out of it is an error here and not a signal later.

        Args:
            name: shown by the operating system beside the mapping.
            nbytes: its extent.
            spans: the bytes that need pages; all of them by default. What lies outside costs nothing and reads as 0.

        Raises:
            OSError: the pages cannot be had.
        """
        self.nbytes = nbytes
        self._fd = os.memfd_create(f"asyncep-{name}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, nbytes)
            for span in [range(nbytes)] if spans is None else spans:
                os.posix_fallocate(self._fd, span.start, len(span))
        except OSError:
            os.close(self._fd)
            raise

    @property
    def descriptor(self) -> int:
        """Of the memory, in the process that made it."""
        return self._fd

    @property
    def path(self) -> str:
        """Opens the memory from any process of the same user."""
        return segment_path(os.getpid(), self._fd)

    @property
    def resident_bytes(self) -> int:
        """Bytes of pages the operating system holds for it."""
        return os.fstat(self._fd).st_blocks * 512

    def close(self) -> None:
        """Drops the maker's hold. Processes that still map it keep it until they end."""
        os.close(self._fd)


def segment_path(pid: int, descriptor: int) -> str:
    """Opens the memory of a descriptor of another process."""
    return f"/proc/{pid}/fd/{descriptor}"


def map_segment(path: str, nbytes: int, *, writable: bool) -> mmap.mmap:
    """Maps a segment of `OwnedSegment` into this process; the mapping outlives the descriptor.

    Raises:
        OSError: the process that made it is gone, or it runs as another user.
    """
    fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=protection)
    finally:
        os.close(fd)
