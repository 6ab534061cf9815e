"""Rows of text out of files of any kind, a window at a time."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from asyncep.files.columnar import ColumnarTable
from asyncep.files.csv_table import CsvTable
from asyncep.files.json_records import JsonArray, JsonLines, is_array, plain
from asyncep.files.kinds import FileFormat, InputError, ReadOptions
from asyncep.files.opening import reading, refuse_foreign
from asyncep.files.records import Raw, Records, Wanted
from asyncep.files.wording import SHELL, Wording

__all__ = ["InputError", "Row", "RowSource"]

# Neighbours often share a prefix (questions on one document), so a shard takes them by so many.
_SHARD_BLOCK = 32
# Their strings are UTF-8.
_BINARY = ("parquet", "arrow")
_counting = threading.Lock()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input.

    Attributes:
        number: counts from 0, over the whole file.
        text: what to classify; None in a row that cannot be classified.
        gold: its true label as the input has it; None where it has none.
        error: why it cannot be classified.
        kept: fields that go to the output as they are.
    """

    number: int
    text: str | None
    gold: Any = None
    error: str | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowSource:
    """Which rows of which file.

    Attributes:
        path: the file.
        text_field: field or column that holds the text.
        gold_field: field or column that holds the true label; None where there is none.
        keep: further fields to keep.
        limit: at most the first so many rows of the file.
        shard: (i, n), from (0, 1): only the i-th of n parts of what the limit leaves.
        options: how the file is read, as far as its name does not say it.
        digest: of the file's bytes, where it is the copy of a stream; its path and time say nothing then.
        words: what the caller calls these, for errors.
    """

    path: Path
    text_field: str = "text"
    gold_field: str | None = None
    keep: tuple[str, ...] = ()
    limit: int | None = None
    shard: tuple[int, int] = (0, 1)
    options: ReadOptions = field(default_factory=ReadOptions)
    digest: str | None = None
    words: Wording = SHELL

    @property
    def format(self) -> FileFormat:
        """What is in the file.

        Raises:
            InputError: its name does not say it, and nobody else does.
        """
        return self.options.format or FileFormat.of(self.path)

    def check(self) -> None:
        """Opens the file and looks for its fields. CSV is read through: an open quote may swallow any number of rows.

        Raises:
            InputError: no such file, an unknown kind, one without these fields, options that it has no use for, or rows
                that cannot be told apart.
        """
        form = self.format
        if self.path.is_fifo():
            raise InputError(f"{self.path}: is a pipe, which can be read once; give - and the pipe as standard input")
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file")
        self._check_part()
        self.options.check(form, self.words)
        if form.kind not in _BINARY and self.options.encoding is None:
            with reading(self.path):
                refuse_foreign(self.path, form, self.words.encoding)
        records = self._records()
        if isinstance(records, JsonLines | JsonArray):
            self._look_for_fields(records)
        else:
            self.count()

    def facts(self) -> list[Any]:
        """What the file is known again by when a job goes on."""
        found = self.path.stat()
        if self.digest is not None:
            return ["a stream", found.st_size, self.digest]
        return [str(self.path.resolve()), found.st_size, found.st_mtime_ns]

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

    def kept_types(self) -> Mapping[str, Any]:
        """Arrow's types of the kept fields, where the file says them."""
        if not self.keep:
            return {}
        types = self._records().types()
        return {name: types[name] for name in self.keep if name in types}

    @property
    def _wanted(self) -> list[Wanted]:
        """What the caller calls each field that is read, and its name."""
        words = self.words
        gold = [(words.gold, self.gold_field)] if self.gold_field else []
        return [(words.text, self.text_field), *gold, *((words.keep, name) for name in self.keep)]

    def _records(self) -> Records:
        form, options = self.format, self.options
        if form.kind in ("csv", "tsv"):
            return CsvTable(self.path, form, options, self._wanted, self.words)
        if form.kind in _BINARY:
            return ColumnarTable(self.path, form, self._wanted)
        if form.kind == "json" and is_array(self.path, form, options.encoding):
            return JsonArray(self.path, form, options.encoding)
        return JsonLines(self.path, form, options.encoding)

    def _check_part(self) -> None:
        """Refuses a limit or a shard that there is not."""
        words, (index, count) = self.words, self.shard
        if self.limit is not None and (type(self.limit) is not int or self.limit < 0):
            raise InputError(f"{words.limit} {self.limit!r}: a number of rows is needed")
        if type(index) is not int or type(count) is not int or not 0 <= index < count:
            raise InputError(f"{words.shard} {self.shard!r}: (i, n) is needed, with i from 0 to n - 1")

    def _look_for_fields(self, records: Records) -> None:
        """Refuses fields that no line has. As a rule the first line has all of them, and is all that is read."""
        missing = self._wanted
        seen: list[str] | None = None
        first = ""
        foreign = False
        for number, record in enumerate(records.raw()):
            fields = records.fields(record)
            if not number and self.format.kind == "json" and isinstance(fields, str) and isinstance(records, JsonLines):
                raise InputError(f"{self.path}: an array of objects, or an object a line, is needed: {fields}")
            if isinstance(fields, dict):
                seen = list(fields) if seen is None else seen
                missing = [(argument, name) for argument, name in missing if name not in fields]
                if not missing:
                    return
            else:
                first = first or f"line {record[0]}: {fields}"
                # In another encoding it may well be an object: it is an error of its row.
                foreign |= "UTF-8" in fields
        if seen is None and first and not foreign and isinstance(records, JsonLines):
            raise InputError(
                f"{self.path}: not one line is a JSON object ({first}); is it of another kind? Give "
                f"{self.words.input_format}"
            )
        if seen is not None:
            argument, name = missing[0]
            raise InputError(
                f"{self.path}: no line has a field {name!r}; the first has {', '.join(seen) or 'none'}. "
                f"Name it with {argument}"
            )

    def _row(self, number: int, line: int, fields: dict[str, Any] | str) -> Row:
        if isinstance(fields, str):
            return Row(number, None, error=f"line {line}: {fields}" if line else fields)
        gold = fields.get(self.gold_field) if self.gold_field else None
        kept = {name: fields.get(name) for name in self.keep} if self.keep else {}
        for name, value in kept.items():
            if isinstance(value, list | dict) and not _writable(value):
                return Row(number, None, gold, f"{name!r}: nested too deep to be written", {**kept, name: None})
        text = fields.get(self.text_field)
        if not isinstance(text, str):
            problem = f"{self.text_field!r}: a string is needed, not {type(text).__name__}"
            return Row(number, None, gold, problem, kept)
        if not text.strip():
            return Row(number, None, gold, f"{self.text_field!r} is empty", kept)
        return Row(number, text, gold, None, kept)


def _writable(value: Any) -> bool:
    try:
        orjson.dumps(value, default=plain)
    except TypeError:
        return False
    return True


def _records_in(source: RowSource, stamp: tuple[int, ...]) -> int:
    """Records that the source's limit leaves. Two who ask at the same time wait for one count."""
    with _counting:
        return _counted(source, stamp)


@lru_cache(maxsize=16)
def _counted(source: RowSource, _stamp: tuple[int, ...]) -> int:
    """The same; counted again only for a file that has changed."""
    records = source._records()
    total = records.count()
    if total is None:
        return sum(1 for _ in islice(records.raw(), source.limit))
    return total if source.limit is None else min(total, source.limit)
