"""Records out of JSONL, CSV and Parquet files: each is accounted for, with its line, as values or as an error.

What can be told apart record by record is an error of its record: a line that is no JSON, a row with too many or too
few fields, bytes that are no UTF-8. What makes it uncertain where records begin and end is an error of the file: a
quote that is not closed, text after a closing quote, a page of Parquet that cannot be read. Blank lines are no records.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Collection, Iterator, Sequence
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import orjson

# Line of the file (0 where it has none) and what stands there.
Raw = tuple[int, Any]

_LONGEST_FIELD = 1 << 26
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Integers from 64 bits on and long fractions, which a float would round.
_LONG_NUMBER = re.compile(rb"[0-9]{16}")


class InputError(ValueError):
    """The input cannot be read at all; the message names the option to change."""


class Number:
    """A JSON number that neither 64 bits nor a float can hold, as it was written."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


class Records(Protocol):
    """One file's records."""

    def raw(self) -> Iterator[Raw]:
        """Every record, as cheap as can be."""
        ...

    def fields(self, record: Raw) -> dict[str, Any] | str:
        """A record's values by field, or why it has none."""
        ...


class JsonLines:
    """One JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def raw(self) -> Iterator[Raw]:
        """See `Records`."""
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                record = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if record.strip():
                    yield number, record

    def fields(self, record: Raw) -> dict[str, Any] | str:
        """See `Records`."""
        line: bytes = record[1]
        try:
            value = orjson.loads(line)
            if _LONG_NUMBER.search(line):
                value = json.loads(line, parse_int=_exact_int, parse_float=_exact_float)
        except orjson.JSONDecodeError as error:
            return f"not JSON: {error}"
        except RecursionError:
            return "not JSON: nested too deep"
        return value if isinstance(value, dict) else f"a JSON object is needed, not {type(value).__name__}"


class CsvTable:
    """Rows of CSV under a header line, as RFC 4180 has it.

    Args:
        wanted: (flag, column) of each column that is read.

    Raises:
        InputError: the header lacks such a column; while reading, where rows cannot be told apart.
    """

    def __init__(self, path: Path, wanted: Sequence[tuple[str, str]]) -> None:
        self._path = path
        # Articles may be longer than csv's default limit of 128 KiB. A quote that is not closed is a field without end.
        csv.field_size_limit(_LONGEST_FIELD)
        self._header = next(self._rows(), (0, []))[1]
        check_columns(path, self._header, wanted)
        self._places = {name: self._header.index(name) for _, name in wanted}

    def raw(self) -> Iterator[Raw]:
        """See `Records`."""
        return islice(self._rows(), 1, None)

    def fields(self, record: Raw) -> dict[str, Any] | str:
        """See `Records`."""
        row: list[str] = record[1]
        if len(row) != len(self._header):
            return f"{len(row)} fields, and the header has {len(self._header)}; is a comma or line break not in quotes?"
        values = {name: row[place] for name, place in self._places.items()}
        for name, value in values.items():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                byte = ord(value[error.start]) & 0xFF
                return f"{name!r} is not UTF-8 (byte {byte:#x} at character {error.start}); save the file as UTF-8"
        return values

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Every row with the line it begins in, the header first."""
        # Bytes that are no UTF-8 are kept as surrogates, by which `fields` knows them.
        with self._path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
            reader = csv.reader(lines, strict=True)
            begins = 1
            try:
                for row in reader:
                    if row:
                        yield begins, row
                    begins = reader.line_num + 1
            except csv.Error as error:
                raise InputError(
                    f"{self._path}: line {reader.line_num}: {error}, in the row that begins in line {begins}. A field "
                    "with a quote in it stands in quotes, and the quote in it is doubled; or give the file as JSONL"
                ) from error


class ParquetTable:
    """Rows of Parquet.

    Args:
        wanted: (flag, column) of each column that is read.

    Raises:
        InputError: no Parquet, or without such a column; while reading, pages that cannot be read.
    """

    def __init__(self, path: Path, wanted: Sequence[tuple[str, str]]) -> None:
        import pyarrow.parquet

        self._path = path
        with _reading(path):
            found = pyarrow.parquet.read_schema(path)
            self.rows = int(pyarrow.parquet.read_metadata(path).num_rows)
        check_columns(path, found.names, wanted)
        names = {name for _, name in wanted}
        self._columns = [name for name in found.names if name in names]

    def raw(self) -> Iterator[Raw]:
        """See `Records`."""
        import pyarrow.parquet

        number = 0
        with (
            _reading(self._path) as place,
            pyarrow.parquet.ParquetFile(self._path, page_checksum_verification=True) as file,
        ):
            for batch in file.iter_batches(batch_size=1024, columns=self._columns):
                for record in _values(batch):
                    yield 0, record
                number += batch.num_rows
                place[0] = number
        if number != self.rows:
            raise InputError(f"{self._path}: the file says it has {self.rows} rows, and {number} can be read")

    def fields(self, record: Raw) -> dict[str, Any] | str:
        """See `Records`."""
        values: dict[str, Any] | str = record[1]
        return values


def check_columns(path: Path, names: Collection[str], wanted: Sequence[tuple[str, str]]) -> None:
    """Refuses a file without a column, or with two of its name.

    Raises:
        InputError: names the flag.
    """
    listed = list(names)
    for flag, name in wanted:
        if name not in listed:
            raise InputError(f"{path}: no column {name!r} among {', '.join(listed) or 'none'}; name it with {flag}")
        if listed.count(name) > 1:
            raise InputError(f"{path}: {listed.count(name)} columns are called {name!r} ({flag}); rename all but one")


def plain(value: Any) -> Any:
    """What `orjson.dumps` asks about a value it does not know: a long number as it was written, others as text."""
    return orjson.Fragment(value.text) if isinstance(value, Number) else str(value)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[list[int]]:
    """Makes an InputError of what pyarrow raises; yields where to note how many rows have been read."""
    import pyarrow

    place = [-1]
    try:
        yield place
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        where = "not a Parquet file" if place[0] < 0 else f"cannot be read from row {place[0]} on"
        raise InputError(f"{path}: {where}: {error}") from error


def _values(batch: Any) -> list[dict[str, Any] | str]:
    """A batch's rows; one with bytes that are no UTF-8 is its error."""
    try:
        rows: list[dict[str, Any] | str] = batch.to_pylist()
    except UnicodeDecodeError:
        rows = []
        for number in range(batch.num_rows):
            try:
                rows += batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                rows.append(f"not UTF-8: {error}")
    return rows


def _exact_int(text: str) -> int | Number:
    # 18 digits are below 2 ** 63 whatever they are.
    return int(text) if len(text) <= 18 else Number(text)


def _exact_float(text: str) -> float | Number:
    value = float(text)
    return value if Decimal(repr(value)) == Decimal(text) else Number(text)
