"""Files opened for reading and writing: compression taken off and put on, text decoded, a byte-order mark taken off."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from asyncep.files.kinds import Compression, FileFormat, InputError

_CHUNK = 1 << 20
# The longer marks first: UTF-32's begins as UTF-16's.
_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
# What is looked at to see whether a file is in another encoding, and how many lines have to say so.
_SAMPLE = 1 << 20
_FOREIGN_LINES = 10


def open_bytes(path: Path, compression: Compression | None) -> BinaryIO:
    """The file's bytes, as they were before compression. A stream that is cut off raises at its end."""
    if compression == "gzip":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if compression == "zstd":
        return io.BufferedReader(_Zstd(path), _CHUNK)
    return path.open("rb")


def open_text(path: Path, compression: Compression | None, encoding: str | None, newline: str = "") -> IO[str]:
    """The file's text, its line ends as they are. Bytes that are none of the encoding become lone surrogates."""
    file = open_bytes(path, compression)
    try:
        marked = marked_encoding(file)
        # A mark is taken off also where the encoding was given.
        same = encoding and marked and marked[:6] == encoding.lower().replace("_", "-")[:6]
        known = (marked if same else encoding) or marked or "utf-8"
    except BaseException:
        file.close()
        raise
    named = "utf-8-sig" if known.lower().replace("_", "-") in ("utf-8", "utf8") else known
    return io.TextIOWrapper(file, encoding=named, errors="surrogateescape", newline=newline)


def marked_encoding(file: BinaryIO) -> str | None:
    """The encoding that a byte-order mark at the beginning names; the file stays at its beginning."""
    # What compresses cannot go back; all of them can look ahead.
    beginning: bytes = file.peek(4)[:4]  # type: ignore[attr-defined] # every reader of `open_bytes` has it
    return next((encoding for mark, encoding in _MARKS if beginning.startswith(mark)), None)


def refuse_foreign(path: Path, form: FileFormat, argument: str) -> None:
    """Refuses a file of text that is not UTF-8 almost throughout: its rows would all be errors, or misread.

    Single lines that are not are errors of their rows.

    Raises:
        InputError: names the encoding that it looks like.
    """
    with open_bytes(path, form.compression) as file:
        if marked_encoding(file):
            return
        sample = file.read(_SAMPLE)
    # The last line may be cut in the middle of a character.
    whole = sample if len(sample) < _SAMPLE else sample[: sample.rfind(b"\n") + 1]
    lines = [line for line in whole.splitlines() if not line.isascii()]
    foreign = [line for line in lines if not _is_utf8(line)]
    if len(foreign) < _FOREIGN_LINES or 2 * len(foreign) < len(lines):
        return
    from charset_normalizer import from_bytes

    best = from_bytes(b"\n".join(foreign)).best()
    like = f"; it looks like {best.encoding}" if best else ""
    raise InputError(
        f"{path}: not UTF-8: {len(foreign)} of the first {len(lines)} lines with characters outside ASCII are not"
        f"{like}. Name its encoding with {argument}"
    )


@contextlib.contextmanager
def seekable(path: Path, compression: Compression | None) -> Iterator[Path]:
    """The file as one that can be read at any place: itself, or an unnamed copy without compression."""
    if compression is None:
        yield path
        return
    with tempfile.TemporaryFile() as copy, open_bytes(path, compression) as file:
        shutil.copyfileobj(file, copy, _CHUNK)
        copy.flush()
        yield Path(f"/proc/self/fd/{copy.fileno()}")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes an `InputError` of what a file raises that cannot be opened, decompressed or decoded."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: the compressed file is cut off or damaged: {error}") from error
    except UnicodeError as error:
        raise InputError(f"{path}: cannot be decoded: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def compressed(file: IO[bytes], compression: Compression | None) -> Iterator[IO[bytes]]:
    """A stream whose bytes are written to `file` compressed. The same bytes give the same file."""
    if compression == "gzip":
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:
            yield cast(IO[bytes], stream)
    elif compression == "zstd":
        import zstandard

        with zstandard.ZstdCompressor(write_checksum=True).stream_writer(file, closefd=False) as stream:
            yield cast(IO[bytes], stream)
    else:
        yield file


@contextlib.contextmanager
def kept_stream(stream: BinaryIO, folder: Path) -> Iterator[tuple[Path, str]]:
    """What a pipe says, kept in an unnamed file of a folder: it is read several times, and nothing is left of it.

    Yields:
        The path to read it from, good within this process, and the digest of its bytes.
    """
    with tempfile.TemporaryFile(dir=folder) as copy:
        digest = blake2b(digest_size=16)
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        yield Path(f"/proc/{os.getpid()}/fd/{copy.fileno()}"), digest.hexdigest()


class _Zstd(io.RawIOBase):
    """Arrow's decompressing stream as Python's: it knows a stream that is cut off."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        super().__init__()
        self._file: Any = pyarrow.input_stream(str(path), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # any buffer; ours is one
        chunk = self._file.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
