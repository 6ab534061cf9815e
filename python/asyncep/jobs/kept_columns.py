"""Kept values in columns of one type: that of the input's column, or, where every row may have another (JSON), the
narrowest that holds all of them as they are."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable
from typing import Any, Literal

import orjson

from asyncep.files.json_records import Number, decoded, plain

# Of one JSON value, or of all of a column.
ValueKind = Literal["nothing", "truth", "whole", "fraction", "text", "other"]

_WHOLE = re.compile(r"-?[0-9]{1,18}")
_EXACT_IN_A_FLOAT = 1 << 53


def as_json(value: Any) -> str | None:
    """A kept value as it waits in a part until the type of its column is known; None for none."""
    return None if value is None else orjson.dumps(value, default=plain).decode()


def as_text(value: Any) -> str | None:
    """A kept value for a column of text: strings as they are, dates and decimals as they print, bytes in
    base64, the rest as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return b64encode(value).decode()
    if isinstance(value, bool | list | dict):
        return orjson.dumps(value, default=plain).decode()
    return str(value)


def kind_of(written: str | None) -> ValueKind:
    """The kind of a value by its JSON."""
    if written is None or written == "null":
        return "nothing"
    first = written[0]
    if first == '"':
        return "text"
    if first in "tf":
        return "truth"
    if _WHOLE.fullmatch(written):
        return "whole"
    if first in "[{" or not any(mark in written for mark in ".eE"):
        return "other"
    return "other" if isinstance(decoded(written.encode()), Number) else "fraction"


class KeptValues:
    """What the values of one column have been so far."""

    def __init__(self) -> None:
        self._kinds: set[ValueKind] = set()
        self._exact = True

    def add(self, values: Iterable[str | None]) -> None:
        """Looks at some more values."""
        for written in values:
            kind = kind_of(written)
            self._kinds.add(kind)
            if kind == "whole" and abs(int(written or 0)) > _EXACT_IN_A_FLOAT:
                self._exact = False

    def arrow_type(self) -> Any:
        """The type of the column in Arrow."""
        import pyarrow

        kinds = self._kinds - {"nothing"}
        if kinds == {"truth"}:
            return pyarrow.bool_()
        if kinds == {"whole"}:
            return pyarrow.int64()
        if kinds == {"fraction"} or (kinds == {"whole", "fraction"} and self._exact):
            return pyarrow.float64()
        return pyarrow.string()


def typed(written: Iterable[str | None], kind: Any) -> Any:
    """An Arrow array of a column's type, of values that waited as JSON."""
    import pyarrow

    if not pyarrow.types.is_string(kind):
        return pyarrow.array([None if w is None else orjson.loads(w) for w in written], kind)
    # Numbers as they were written: a reader of JSON would round the long ones.
    texts = [None if w in (None, "null") else orjson.loads(w) if w[0] == '"' else w for w in written]
    return pyarrow.array(texts, kind)
