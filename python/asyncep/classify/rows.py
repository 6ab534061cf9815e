"""Rows of text out of JSONL, CSV and Parquet files, a window at a time."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

KINDS = (".jsonl", ".ndjson", ".csv", ".parquet")
# Neighbours often share a prefix (questions on one document), so a shard takes them by so many.
_SHARD_BLOCK = 32


class InputError(ValueError):
    """The input cannot be read at all; the message names the option to change."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input.

    Attributes:
        number: counts from 0, over the whole file.
        text: what to classify; None in a row that cannot be classified.
        gold: its true label, where the input has one.
        error: why it cannot be classified.
        kept: fields that go to the output as they are.
    """

    number: int
    text: str | None
    gold: str | None = None
    error: str | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowSource:
    """Which rows of which file.

    Attributes:
        path: a ``.jsonl``, ``.ndjson``, ``.csv`` or ``.parquet`` file.
        text_field: field or column that holds the text.
        gold_field: field or column that holds the true label; None where there is none.
        keep: further fields to keep.
        limit: at most the first so many rows of the file.
        shard: (i, n), from (0, 1): only the i-th of n parts of what the limit leaves.
    """

    path: Path
    text_field: str = "text"
    gold_field: str | None = None
    keep: tuple[str, ...] = ()
    limit: int | None = None
    shard: tuple[int, int] = (0, 1)

    def check(self) -> None:
        """Opens the file and looks at its columns.

        Raises:
            InputError: no such file, an unknown kind of file, or one without these columns.
        """
        if self.path.suffix.lower() not in KINDS:
            raise InputError(f"{self.path}: give a .jsonl, .csv or .parquet file")
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file")
        next(self._raw()[0], None)

    def rows(self) -> Iterator[Row]:
        """Every row, in order. A bad row comes with its error; the next goes on."""
        for _, window in self.windows(1024):
            yield from window

    def windows(self, size: int, done: Collection[int] = ()) -> Iterator[tuple[int, list[Row]]]:
        """(number, rows) of each window of `size` rows but those `done`, which are passed over without being parsed."""
        raw, parse = self._raw()
        chosen = enumerate(islice(raw, self.limit))
        index, count = self.shard
        if count > 1:
            chosen = ((n, record) for n, record in chosen if n // _SHARD_BLOCK % count == index)  # type: ignore[assignment]
        number = 0
        while window := list(islice(chosen, size)):
            if number not in done:
                yield number, [self._row(n, parse(record)) for n, record in window]
            number += 1

    def count(self) -> int:
        """How many rows there are; reads the file once, without parsing where that can be avoided."""
        if self.path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            total = int(pyarrow.parquet.read_metadata(self.path).num_rows)
        else:
            total = sum(1 for _ in self._raw()[0])
        if self.limit is not None:
            total = min(total, self.limit)
        index, count = self.shard
        whole, rest = divmod(total, _SHARD_BLOCK * count)
        return whole * _SHARD_BLOCK + min(_SHARD_BLOCK, max(0, rest - index * _SHARD_BLOCK))

    def _raw(self) -> tuple[Iterator[Any], Callable[[Any], Any]]:
        readers = {".csv": self._csv, ".parquet": self._parquet}
        reader = readers.get(self.path.suffix.lower())
        return (self._jsonl(), _parse_json) if reader is None else (reader(), _as_it_is)

    def _jsonl(self) -> Iterator[bytes]:
        with self.path.open("rb") as lines:
            for line in lines:
                if line.strip():
                    yield line

    def _csv(self) -> Iterator[Mapping[str, Any]]:
        # Articles may be longer than csv's default limit for a field of 128 KiB.
        csv.field_size_limit(1 << 30)
        with self.path.open(newline="", encoding="utf-8", errors="replace") as lines:
            reader = csv.DictReader(lines)
            self._check_columns(reader.fieldnames or ())
            yield from reader

    def _parquet(self) -> Iterator[Mapping[str, Any]]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(self.path)
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{self.path}: not a Parquet file: {error}") from error
        with file:
            self._check_columns(file.schema_arrow.names)
            wanted = (self.text_field, self.gold_field, *self.keep)
            columns = [name for name in file.schema_arrow.names if name in wanted]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()

    def _check_columns(self, names: Sequence[str]) -> None:
        for flag, name in (("--text-field", self.text_field), *(("--keep", name) for name in self.keep)):
            if name not in names:
                raise InputError(
                    f"{self.path}: no column {name!r} among {', '.join(names) or 'none'}; name it with {flag}"
                )

    def _row(self, number: int, fields: Any) -> Row:
        if isinstance(fields, str):
            return Row(number, None, error=fields)
        if not isinstance(fields, dict):
            return Row(number, None, error=f"a JSON object is needed, not {type(fields).__name__}")
        gold = fields.get(self.gold_field) if self.gold_field else None
        gold = None if gold is None else str(gold)
        kept = {name: fields.get(name) for name in self.keep} if self.keep else {}
        text = fields.get(self.text_field)
        if not isinstance(text, str):
            problem = f"{self.text_field!r}: a string is needed, not {type(text).__name__}"
            return Row(number, None, gold, problem, kept)
        if not text.strip():
            return Row(number, None, gold, f"{self.text_field!r} is empty", kept)
        return Row(number, text, gold, None, kept)


def _parse_json(line: bytes) -> Any:
    """The line's value; a line that is none gives its error as text, and a line that is a string an error as well."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"not JSON: {error}"
    return "a JSON object is needed, not str" if isinstance(value, str) else value


def _as_it_is(fields: Any) -> Any:
    return fields
