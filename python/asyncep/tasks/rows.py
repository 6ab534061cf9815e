"""Rows of text out of JSONL, CSV and Parquet files, a window at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from asyncep.tasks.records import CsvTable, InputError, JsonLines, ParquetTable, Raw, Records

__all__ = ["KINDS", "InputError", "Row", "RowSource"]

KINDS = (".jsonl", ".ndjson", ".csv", ".parquet")
# Neighbours often share a prefix (questions on one document), so a shard takes them by so many.
_SHARD_BLOCK = 32


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
        """Opens the file and looks for its fields. CSV is read through: an open quote may swallow any number of rows.

        Raises:
            InputError: no such file, an unknown kind, one without these fields, or rows that cannot be told apart.
        """
        if self.path.suffix.lower() not in KINDS:
            raise InputError(f"{self.path}: give a .jsonl, .csv or .parquet file")
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file")
        records = self._records()
        if isinstance(records, JsonLines):
            self._look_for_fields(records)
        else:
            self.count()

    def rows(self) -> Iterator[Row]:
        """Every row, in order. A bad row comes with its error; the next goes on."""
        for _, window in self.windows(1024):
            yield from window

    def windows(self, size: int, done: Collection[int] = ()) -> Iterator[tuple[int, list[Row]]]:
        """(number, rows) of each window of `size` rows but those `done`, which are passed over without being parsed."""
        records = self._records()
        chosen: Iterator[tuple[int, Raw]] = enumerate(islice(records.raw(), self.limit))
        index, count = self.shard
        if count > 1:
            chosen = ((n, record) for n, record in chosen if n // _SHARD_BLOCK % count == index)
        number = 0
        while window := list(islice(chosen, size)):
            if number not in done:
                yield number, [self._row(n, record[0], records.fields(record)) for n, record in window]
            number += 1

    def count(self) -> int:
        """How many rows there are; reads the file once, without parsing where that can be avoided."""
        found = self.path.stat()
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        total = _records_in(replace(self, shard=(0, 1)), stamp)
        index, count = self.shard
        whole, rest = divmod(total, _SHARD_BLOCK * count)
        return whole * _SHARD_BLOCK + min(_SHARD_BLOCK, max(0, rest - index * _SHARD_BLOCK))

    @property
    def _wanted(self) -> list[tuple[str, str]]:
        """(flag, field) of each field that is read."""
        gold = [("--gold-field", self.gold_field)] if self.gold_field else []
        return [("--text-field", self.text_field), *gold, *(("--keep", name) for name in self.keep)]

    def _records(self) -> Records:
        kind = self.path.suffix.lower()
        if kind == ".csv":
            return CsvTable(self.path, self._wanted)
        return ParquetTable(self.path, self._wanted) if kind == ".parquet" else JsonLines(self.path)

    def _look_for_fields(self, records: JsonLines) -> None:
        """Refuses fields that no line has. As a rule the first line has all of them, and is all that is read."""
        missing = self._wanted
        seen: list[str] | None = None
        for record in records.raw():
            fields = records.fields(record)
            if isinstance(fields, dict):
                seen = list(fields) if seen is None else seen
                missing = [(flag, name) for flag, name in missing if name not in fields]
                if not missing:
                    return
        # Without a single object every line is an error already, with a better reason.
        if seen is not None:
            flag, name = missing[0]
            raise InputError(
                f"{self.path}: no line has a field {name!r}; the first has {', '.join(seen) or 'none'}. "
                f"Name it with {flag}"
            )

    def _row(self, number: int, line: int, fields: dict[str, Any] | str) -> Row:
        if isinstance(fields, str):
            return Row(number, None, error=f"line {line}: {fields}" if line else fields)
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


@lru_cache(maxsize=16)
def _records_in(source: RowSource, _stamp: tuple[int, ...]) -> int:
    """Records that the source's limit leaves; counted again only for a file that has changed."""
    records = source._records()
    if isinstance(records, ParquetTable):
        return records.rows if source.limit is None else min(records.rows, source.limit)
    return sum(1 for _ in islice(records.raw(), source.limit))
