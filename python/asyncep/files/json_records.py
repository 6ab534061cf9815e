"""Records of JSON: one object a line, or one array of objects."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson

from asyncep.files.kinds import FileFormat, InputError
from asyncep.files.opening import marked_encoding, open_bytes, open_text, reading
from asyncep.files.records import Raw

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Integers from 64 bits on and long fractions, which a float would round.
_LONG_NUMBER = re.compile(rb"[0-9]{16}")
# An array is held whole.
_LARGEST_ARRAY = 2 << 30


class Number:
    """A JSON number that neither 64 bits nor a float can hold, as it was written."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


class JsonLines:
    """One JSON object a line."""

    def __init__(self, path: Path, form: FileFormat, encoding: str | None) -> None:
        self._path, self._form, self._encoding = path, form, encoding

    def raw(self) -> Iterator[Raw]:
        """See `Records`."""
        with reading(self._path):
            lines = _utf8_lines(self._path, self._form, self._encoding)
            for number, line in enumerate(lines, start=1):
                record = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if record.strip():
                    yield number, record

    def fields(self, record: Raw) -> dict[str, Any] | str:
        """See `Records`."""
        try:
            value = decoded(record[1])
        except orjson.JSONDecodeError as error:
            return f"not JSON: {error}"
        except RecursionError:
            return "not JSON: nested too deep"
        return value if isinstance(value, dict) else f"a JSON object is needed, not {type(value).__name__}"

    def count(self) -> int | None:
        """See `Records`."""
        return None

    def types(self) -> Mapping[str, Any]:
        """See `Records`."""
        return {}


class JsonArray:
    """One array of objects, read whole.

    Raises:
        InputError: it is no array, or too large to be held.
    """

    def __init__(self, path: Path, form: FileFormat, encoding: str | None) -> None:
        self._path = path
        with reading(path):
            content = b"".join(_utf8_lines(path, form, encoding)).removeprefix(_BYTE_ORDER_MARK)
        if len(content) > _LARGEST_ARRAY:
            raise InputError(f"{path}: a JSON array is read whole, and this has {len(content):,} bytes; write JSONL")
        try:
            values = decoded(content)
        except (orjson.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}: not JSON: {error}") from error
        if not isinstance(values, list):
            raise InputError(f"{path}: an array of objects is needed, not {type(values).__name__}")
        self._values: list[Any] = values

    def raw(self) -> Iterator[Raw]:
        """See `Records`."""
        return ((0, value) for value in self._values)

    def fields(self, record: Raw) -> dict[str, Any] | str:
        """See `Records`."""
        value = record[1]
        return value if isinstance(value, dict) else f"a JSON object is needed, not {type(value).__name__}"

    def count(self) -> int | None:
        """See `Records`."""
        return len(self._values)

    def types(self) -> Mapping[str, Any]:
        """See `Records`."""
        return {}


def is_array(path: Path, form: FileFormat, encoding: str | None) -> bool:
    """Whether a file of JSON begins as an array does, and not as a first line of JSONL."""
    with reading(path), open_text(path, form.compression, encoding) as file:
        return file.read(4096).lstrip()[:1] in ("[", "")


def decoded(content: bytes) -> Any:
    """A JSON value, its long numbers as they were written.

    Raises:
        JSONDecodeError: it is none.
    """
    value = orjson.loads(content)
    if _LONG_NUMBER.search(content):
        value = json.loads(content, parse_int=_exact_int, parse_float=_exact_float)
    return value


def plain(value: Any) -> Any:
    """What `orjson.dumps` asks about a value it does not know: a long number as it was written, bytes in base64, others
    as text."""
    if isinstance(value, Number):
        return orjson.Fragment(value.text)
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _utf8_lines(path: Path, form: FileFormat, encoding: str | None) -> Iterator[bytes]:
    with open_bytes(path, form.compression) as file:
        encoding = encoding or marked_encoding(file)
        if encoding in (None, "utf-8-sig"):
            yield from file
            return
    # Line feeds alone end lines: a carriage return is a blank of JSON's.
    with open_text(path, form.compression, encoding, newline="\n") as text:
        for line in text:
            yield line.encode("utf-8", "surrogateescape")


def _exact_int(text: str) -> int | Number:
    # 18 digits are below 2 ** 63 whatever they are.
    return int(text) if len(text) <= 18 else Number(text)


def _exact_float(text: str) -> float | Number:
    value = float(text)
    try:
        exact = Decimal(repr(value)) == Decimal(text)
    except ArithmeticError:  # an exponent that not even a decimal has
        exact = False
    return value if exact else Number(text)
