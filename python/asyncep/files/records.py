"""Records of a file: each is accounted for, with its line, as values or as an error.

What can be told apart record by record is an error of its record: a line that is no JSON, a row with too many or too
few fields, bytes that are none of the encoding. What makes it uncertain where records begin and end is an error of the
file: a quote that is not closed, text after a closing quote, a compressed file that is cut off, a page of Parquet that
cannot be read. Blank lines are no records.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from asyncep.files.kinds import InputError

# Line of the file (0 where it has none) and what stands there.
Raw = tuple[int, Any]
# What the caller calls it, and a column's name.
Wanted = tuple[str, str]


class Records(Protocol):
    """One file's records."""

    def raw(self) -> Iterator[Raw]:
        """Every record, as cheap as can be."""
        ...

    def fields(self, record: Raw) -> dict[str, Any] | str:
        """A record's values by field, or why it has none."""
        ...

    def count(self) -> int | None:
        """How many there are, where the file says it; None where they have to be counted."""
        ...

    def types(self) -> Mapping[str, Any]:
        """Arrow's types of the columns, where every value of a column has one and the same."""
        ...


def check_columns(path: Path, names: Collection[str], wanted: Sequence[Wanted]) -> None:
    """Refuses a file without a column, or with two of its name.

    Raises:
        InputError: names the argument.
    """
    listed = list(names)
    for argument, name in wanted:
        if name not in listed:
            among = ", ".join(map(repr, listed)) if any("," in name for name in listed) else ", ".join(listed)
            raise InputError(f"{path}: no column {name!r} among {among or 'none'}; name it with {argument}")
        if listed.count(name) > 1:
            raise InputError(
                f"{path}: {listed.count(name)} columns are called {name!r} ({argument}); rename all but one"
            )
