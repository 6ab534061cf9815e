"""Rows of files that are written by columns: Parquet, and Arrow's IPC as a file or a stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncep.files.kinds import FileFormat, InputError
from asyncep.files.opening import open_bytes, reading, seekable
from asyncep.files.records import Raw, Wanted, check_columns

_BATCH = 1024
_IPC_FILE = b"ARROW1"


class ColumnarTable:
    """One file's rows; of its columns only those that are wanted are read.

    Args:
        wanted: (argument, column) of each column that is read.

    Raises:
        InputError: not such a file, or without such a column; while reading, pages that cannot be read.
    """

    def __init__(self, path: Path, form: FileFormat, wanted: Sequence[Wanted]) -> None:
        self._path, self._form = path, form
        with self._opened() as (schema, rows, _):
            self._rows = rows
            check_columns(path, schema.names, wanted)
            names = {name for _, name in wanted}
            self._columns = [name for name in schema.names if name in names]
            self._types = {name: schema.field(name).type for name in self._columns}

    def raw(self) -> Iterator[Raw]:
        """See `Records`."""
        number = 0
        with self._opened() as (_, rows, batches):
            found = batches(self._columns)
            while (batch := self._next(found, number)) is not None:
                for record in _values(batch):
                    yield 0, record
                number += batch.num_rows
        if rows is not None and number != rows:
            raise InputError(f"{self._path}: the file says it has {rows} rows, and {number} can be read")

    def fields(self, record: Raw) -> dict[str, Any] | str:
        """See `Records`."""
        values: dict[str, Any] | str = record[1]
        return values

    def count(self) -> int | None:
        """See `Records`."""
        if self._rows is None:
            with self._opened() as (_, _, batches):
                found, total = batches(self._columns), 0
                while (batch := self._next(found, total)) is not None:
                    total += batch.num_rows
                self._rows = total
        return self._rows

    def types(self) -> Mapping[str, Any]:
        """See `Records`."""
        return self._types

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, int | None, Any]]:
        """The schema, the number of rows where the file says it, and what gives batches of some columns."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(reading(self._path))
            path = stack.enter_context(seekable(self._path, self._form.compression))
            try:
                opened = _parquet(path, stack) if self._form.kind == "parquet" else _ipc(path, stack)
            except Exception as error:
                if _is_arrows(error):
                    kind = "a Parquet file" if self._form.kind == "parquet" else "a file or stream of Arrow's IPC"
                    raise InputError(f"{self._path}: not {kind}: {error}") from error
                raise
            yield opened

    def _next(self, batches: Iterator[Any], number: int) -> Any:
        try:
            return next(batches, None)
        except Exception as error:
            if _is_arrows(error):
                raise InputError(f"{self._path}: cannot be read from row {number} on: {error}") from error
            raise


def _parquet(path: Path, stack: contextlib.ExitStack) -> tuple[Any, int | None, Any]:
    import pyarrow.parquet

    file = stack.enter_context(pyarrow.parquet.ParquetFile(path, page_checksum_verification=True))

    def batches(columns: list[str]) -> Iterator[Any]:
        return iter(file.iter_batches(batch_size=_BATCH, columns=columns))

    return file.schema_arrow, int(file.metadata.num_rows), batches


def _ipc(path: Path, stack: contextlib.ExitStack) -> tuple[Any, int | None, Any]:
    import pyarrow
    import pyarrow.ipc

    with open_bytes(path, None) as file:
        whole = file.read(len(_IPC_FILE)) == _IPC_FILE
    source = stack.enter_context(pyarrow.OSFile(str(path)))
    if whole:
        reader = stack.enter_context(pyarrow.ipc.open_file(source))
        found = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        reader = stack.enter_context(pyarrow.ipc.open_stream(source))
        found = iter(reader)

    def batches(columns: list[str]) -> Iterator[Any]:
        for batch in found:
            chosen = batch.select(columns)
            # What the buffers say of themselves is not checked otherwise: a damaged file would read beyond them.
            chosen.validate(full=True)
            yield from _divided(chosen)

    return reader.schema, None, batches


def _divided(batch: Any) -> Iterator[Any]:
    return (batch.slice(start, _BATCH) for start in range(0, batch.num_rows, _BATCH))


def _is_arrows(error: Exception) -> bool:
    """Whether Arrow says by it that a file is not as it should be."""
    import pyarrow

    return isinstance(error, pyarrow.ArrowException | OSError | UnicodeError | ValueError) and not isinstance(
        error, InputError
    )


def _values(batch: Any) -> list[dict[str, Any] | str]:
    """A batch's rows; one with bytes that are no UTF-8 is its error."""
    try:
        rows: list[dict[str, Any] | str] = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = []
        for number in range(batch.num_rows):
            try:
                rows += batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                rows.append(f"not UTF-8: {error}")
            except (ValueError, OverflowError) as error:  # a time that Python has none for
                rows.append(f"cannot be read: {error}")
    return rows
