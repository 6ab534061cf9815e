"""Rows of CSV and TSV."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from asyncep.files.kinds import FileFormat, InputError, ReadOptions
from asyncep.files.opening import open_text, reading
from asyncep.files.records import Raw, Wanted, check_columns
from asyncep.files.wording import SHELL, Wording

_LONGEST_FIELD = 1 << 26
# In the order in which they are tried; the kind's own first.
_DELIMITERS = {"csv": ",;\t|", "tsv": "\t,;|"}


class CsvTable:
    """Rows under a header line, as RFC 4180 has it, with any delimiter.

    Args:
        wanted: (argument, column) of each column that is read.

    Raises:
        InputError: the header lacks such a column; while reading, where rows cannot be told apart.
    """

    def __init__(
        self, path: Path, form: FileFormat, options: ReadOptions, wanted: Sequence[Wanted], words: Wording = SHELL
    ) -> None:
        self._path, self._form, self._options, self._words = path, form, options, words
        # Articles may be longer than csv's default limit of 128 KiB. A quote that is not closed is a field without end.
        csv.field_size_limit(_LONGEST_FIELD)
        self._delimiter, self._header = self._find_header([name for _, name in wanted])
        check_columns(path, self._header, wanted)
        self._places = {name: self._header.index(name) for _, name in wanted}

    def raw(self) -> Iterator[Raw]:
        """See `Records`."""
        return islice(self._rows(self._delimiter), 1 if self._options.header else 0, None)

    def fields(self, record: Raw) -> dict[str, Any] | str:
        """See `Records`."""
        row: list[str] = record[1]
        if len(row) != len(self._header):
            first = "the header" if self._options.header else "the first row"
            return (
                f"{len(row)} fields, and {first} has {len(self._header)}; is a delimiter or line break not in quotes?"
            )
        values = {name: row[place] for name, place in self._places.items()}
        for name, value in values.items():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                byte = ord(value[error.start]) & 0xFF
                encoding = self._options.encoding or "UTF-8"
                return (
                    f"{name!r} is not {encoding} (byte {byte:#x} at character {error.start}); "
                    f"name the file's encoding with {self._words.encoding}, or save it as UTF-8"
                )
        return values

    def count(self) -> int | None:
        """See `Records`."""
        return None

    def types(self) -> Mapping[str, Any]:
        """See `Records`."""
        import pyarrow

        return {name: pyarrow.string() for name in self._places}

    def _find_header(self, wanted: Sequence[str]) -> tuple[str, list[str]]:
        """The delimiter, and the columns' names: the first delimiter with which all that are wanted are there."""
        tried = [self._options.delimiter] if self._options.delimiter else list(_DELIMITERS[self._form.kind])
        if not self._options.header and len(tried) > 1:
            tried = [self._dividing(tried)]
        found: list[tuple[str, list[str]]] = []
        for delimiter in tried:
            try:
                header = next(self._rows(delimiter), (0, []))[1]
            except InputError:
                # With another delimiter the quotes may stand where they may.
                if delimiter == tried[-1] and not found:
                    raise
                continue
            if not self._options.header:
                header = [str(number) for number in range(1, len(header) + 1)]
            if all(name in header for name in wanted):
                return delimiter, header
            found.append((delimiter, header))
        # As an error shows it best: the one that makes the most columns of it.
        return max(found, key=lambda entry: len(entry[1]))

    def _dividing(self, tried: Sequence[str]) -> str:
        """The delimiter of a table without names: the only one that divides its first row."""
        found = []
        for delimiter in tried:
            with contextlib.suppress(InputError):
                if len(next(self._rows(delimiter), (0, []))[1]) > 1:
                    found.append(delimiter)
        if len(found) > 1:
            shown = " and ".join(map(repr, found))
            raise InputError(
                f"{self._path}: its first row can be divided by {shown}; say by which: {self._words.delimiter}"
            )
        return found[0] if found else tried[0]

    def _rows(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Every row with the line it begins in, the header first."""
        quote = self._options.quote
        # Bytes that are none of the encoding are kept as surrogates, by which `fields` knows them.
        with reading(self._path), open_text(self._path, self._form.compression, self._options.encoding) as lines:
            reader = csv.reader(
                lines,
                delimiter=delimiter,
                quotechar=quote or None,
                quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
                strict=True,
            )
            begins = 1
            try:
                for row in reader:
                    if row:
                        yield begins, row
                    begins = reader.line_num + 1
            except csv.Error as error:
                raise InputError(
                    f"{self._path}: line {reader.line_num}: {error}, in the row that begins in line {begins}. A field "
                    f"with a quote in it stands in quotes, and the quote in it is doubled; {self._words.quote} none "
                    "reads quotes as any other character"
                ) from error
