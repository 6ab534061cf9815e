"""A batch's input file, as it is on the disk now: whole, or a reason why not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from asyncep_sgl.front.batches.lines import Problem, RequestLine, body_of, read_lines, split


class FileChanged(Exception):
    """A file is not what was uploaded."""


def open_input(path: Path, size: int | None) -> IO[bytes]:
    """Opens a file.

    Args:
        size: what it had when it was uploaded; None where its record is gone.

    Raises:
        FileChanged: it has another size now.
        OSError: it cannot be opened.
    """
    file = path.open("rb")
    found = os.fstat(file.fileno()).st_size
    if size is None or found != size:
        file.close()
        raise FileChanged("its record is gone" if size is None else f"it has {found} bytes, {size} were uploaded")
    return file


def read_input(path: Path, size: int | None, endpoint: str) -> tuple[list[RequestLine], list[Problem]]:
    """The requests of a file and what is wrong with it; raises as `open_input` does."""
    with open_input(path, size) as file:
        return read_lines(split(file), endpoint)


def read_body(file: IO[bytes], line: RequestLine) -> bytes:
    """The body of one request, in JSON.

    Raises:
        ValueError: something else stands there now.
        OSError: it cannot be read.
    """
    return body_of(os.pread(file.fileno(), line.length, line.offset), line.custom_id)


def unreadable(error: Exception, line: RequestLine | None = None) -> Problem:
    """What a client is told of a file that cannot be read."""
    # What the operating system says, without the path it says it of.
    reason = error.strerror or "it cannot be read" if isinstance(error, OSError) else str(error)
    if line is not None:
        return Problem("input_file_unreadable", f"the input file can no longer be read: {reason}", line.number)
    return Problem("input_file_unreadable", f"the input file cannot be read: {reason}; upload it again")
