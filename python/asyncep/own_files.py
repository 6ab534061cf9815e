"""Files that a command writes: never over what it reads, over another's only when told to, and whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from asyncep.client.errors import OptionError

# How the user calls a path, such as OUT or --report, and the path.
Named = tuple[str, Path]
Identity = list[int]


class OutputError(OptionError):
    """A file that cannot be written where it was asked for; names the argument and the fix."""


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file: by their names, symbolic links followed, or as hard links of one inode."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samestat(one.stat(), other.stat())
    except OSError:
        return False


def check_apart(writes: Sequence[Named], reads: Sequence[Named], folders: Sequence[Path] = ()) -> None:
    """Refuses to write over what is read, or two things to one file. No flag allows it.

    Args:
        writes: every file that is written.
        reads: every file, or folder of files, that is read.
        folders: folders of the command's own, which it empties: nothing else may lie in them.

    Raises:
        OutputError: names both arguments.
    """
    for number, (flag, path) in enumerate(writes):
        for name, read in reads:
            if same_file(path, read):
                raise OutputError(f"{flag} {path}: is the file that is read as {name}; give another path to write to")
            if read.is_dir() and path.exists() and _inside(path, read):
                raise OutputError(f"{flag} {path}: is a file of {name}, which is read; give another path to write to")
        for name, other in writes[:number]:
            if same_file(path, other):
                raise OutputError(f"{flag} {path}: is the file that is written as {name}; give another path")
    for folder in folders:
        for flag, path in (*writes, *reads):
            if same_file(path, folder) or _inside(path, folder):
                raise OutputError(f"{flag} {path}: lies in {folder}, which is emptied at the end; give another path")


def check_free(
    flag: str, path: Path, *, overwrite: bool, own: Identity | None = None, fix: str = "--overwrite"
) -> None:
    """Refuses a path where something stands that is not the command's own, or whose folder is not there.

    Args:
        overwrite: a regular file may be written over.
        own: the `identity` of a file the command itself has put there before.
        fix: what the caller gives to write over it.

    Raises:
        OutputError: names the argument and the fix.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{flag} {path}: there is no folder {path.parent}; make it, or correct the path")
    try:
        found = path.lstat()
    except OSError:
        return
    if not path.is_file() and (path.exists() or not stat.S_ISLNK(found.st_mode)):
        raise OutputError(f"{flag} {path}: is there and not a file; give another path")
    if not overwrite and (own is None or identity(path) != own):
        raise OutputError(f"{flag} {path}: is there already; move it away, give another path, or give {fix}")


def identity(path: Path) -> Identity | None:
    """What a file is known again by, also after a rename; None where there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def put_in_place(flag: str, unfinished: Path, path: Path, *, overwrite: bool, fix: str = "--overwrite") -> None:
    """Gives a finished file its name. Without `overwrite` what has come to stand there meanwhile is kept.

    Raises:
        OutputError: something stands there.
    """
    if overwrite or identity(path) == identity(unfinished):
        unfinished.replace(path)
    else:
        try:
            os.link(unfinished, path)
        except FileExistsError:
            check_free(flag, path, overwrite=False, fix=fix)
        except OSError:
            # A file system without hard links: looking first is all that can be done there.
            check_free(flag, path, overwrite=False, fix=fix)
            unfinished.replace(path)
        else:
            unfinished.unlink()
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_file(flag: str, path: Path, *, overwrite: bool = False, reads: Sequence[Named] = ()) -> Iterator[IO[bytes]]:
    """A file to write, which gets its name when the block ends without an error and leaves nothing otherwise.

    Raises:
        OutputError: the path cannot be used, see `check_apart` and `check_free`.
    """
    check_apart([(flag, path)], reads)
    check_free(flag, path, overwrite=overwrite)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_in_place(flag, unfinished, path, overwrite=overwrite)
    finally:
        unfinished.unlink(missing_ok=True)


def _inside(path: Path, folder: Path) -> bool:
    return os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)
