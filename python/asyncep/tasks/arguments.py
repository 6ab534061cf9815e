"""Arguments of a Python caller, checked against the types that are declared: a wrong one is refused by its name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import msgspec

from asyncep.client.errors import OptionError
from asyncep.tasks.frames import listed
from asyncep.tasks.label_files import Labels, labels_from, read_labels
from asyncep.tasks.task import PromptOptions, TaskOptions

_Declared = TypeVar("_Declared")
# Names; names and mappings, or one mapping, as a file of labels has them; or such a file.
LabelsGiven = Sequence[str | Mapping[str, Any]] | Mapping[str, Any] | Path
_NEEDED = {
    "array": "a list",
    "object": "a mapping",
    "str": "a string",
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "null": "None",
}
HALF = "half of a surrogate pair, which is no character; is its encoding right?"
_PLACE = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<where>.*)`)?")
_EXPECTED = re.compile(r"Expected `([^`]+)`(.*?), got `?([^`]+)`?")


class FileOptions(TypedDict):
    """Arguments of `Runtime.classify_file` that say how files are read and written."""

    text: str
    gold: str | None
    keep: Sequence[str]
    limit: int | None
    shard: tuple[int, int]
    restart: bool
    overwrite: bool
    input_format: str | None
    output_format: str | None
    encoding: str | None
    delimiter: str | None
    quote: str
    header: bool


def task_options(labels: Any, options: PromptOptions) -> TaskOptions:
    """What was asked, whole.

    Args:
        labels: a list, an array or a column of strings; a list with mappings, or one mapping, as a file of labels has
            them (`label_files.read_labels`); or the path of such a file.
        options: see `TaskOptions`; ``calibrate`` may be one text.

    Raises:
        OptionError: an argument has another type, or a value that cannot be used; it is named.
    """
    given: dict[str, Any] = {**options}
    refuse_unknown(given, PromptOptions)
    calibrate = given.get("calibrate", ())
    given["calibrate"] = [calibrate] if isinstance(calibrate, str) else _plain("calibrate", calibrate)
    known = _labels(labels)
    for name, table in (("descriptions", known.descriptions), ("words", known.words), ("threshold", known.thresholds)):
        if table and name in given:
            raise OptionError(f"{name}: some stand with the labels already; give them in one place")
        if table:
            given[name] = table
    wanted = as_declared({**given, "labels": known.names}, TaskOptions)
    wanted.check()
    return wanted


def refuse_unknown(values: Mapping[str, Any], kind: type) -> None:
    """Refuses a keyword argument that there is not.

    Raises:
        OptionError: names it, and those that there are.
    """
    known = kind.__annotations__
    if unknown := sorted(set(values) - set(known)):
        raise OptionError(f"{unknown[0]}: no such option; there are {', '.join(sorted(known))}")


def as_declared(values: Mapping[str, Any], kind: type[_Declared]) -> _Declared:
    """A dataclass or typed dictionary made of values that have its fields' types.

    Raises:
        OptionError: one has not; names it, and the entry of a list.
    """
    try:
        return msgspec.convert({name: _scalar(value) for name, value in values.items()}, kind, strict=True)
    except msgspec.ValidationError as error:
        raise OptionError(_named(str(error))) from None
    # An object that is no plain data, or has no end.
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise OptionError(f"{_odd_one(values)}: {error}") from None


def checked_types(**given: tuple[Any, Any]) -> None:
    """Refuses arguments of other types than they should have.

    Args:
        **given: by the argument's name, its value and its type.

    Raises:
        OptionError: names the argument.
    """
    for name, (value, kind) in given.items():
        as_declared({name: value}, _holding(name, kind))


@cache
def _holding(name: str, kind: Any) -> type[msgspec.Struct]:
    return msgspec.defstruct("Given", [(name, kind)])


def checked_text(argument: str, value: Any) -> None:
    """Refuses what is no text.

    Raises:
        OptionError: names the argument.
    """
    if not isinstance(value, str):
        raise OptionError(f"{argument}: a string is needed, not {type(value).__name__}")
    if is_broken(value):
        raise OptionError(f"{argument}: {HALF}")


def is_broken(text: str) -> bool:
    """Whether a text has half of a surrogate pair in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def path_of(argument: str, given: Any) -> Path:
    """A path as callers write one.

    Raises:
        OptionError: it is none; names the argument.
    """
    if not isinstance(given, str | os.PathLike) or isinstance(os.fspath(given), bytes) or not os.fspath(given):
        raise OptionError(f"{argument}: a path is needed, not {given!r}")
    return Path(given)


def _labels(given: Any) -> Labels:
    if isinstance(given, Path):
        return read_labels(given)
    if isinstance(given, Mapping):
        return labels_from(given, "labels")
    found = _plain("labels", given)
    if any(isinstance(entry, Mapping) for entry in found):
        return labels_from(found, "labels")
    return Labels(tuple(found))


def _plain(argument: str, values: Any) -> list[Any]:
    found = listed(argument, values)
    # numpy's strings are strings of its own.
    return [str(value) if isinstance(value, str) else value for value in found]


def _scalar(value: Any) -> Any:
    """Python's own number or truth value in the place of numpy's."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


def _odd_one(values: Mapping[str, Any]) -> str:
    for name, value in values.items():
        try:
            msgspec.to_builtins(value)
        except Exception:
            return name
    return ", ".join(values)


def _named(message: str) -> str:
    """msgspec's words in those of a Python caller."""
    parts = _PLACE.fullmatch(message)
    what, where = (parts["what"], parts["where"] or "arguments") if parts else (message, "arguments")
    if expected := _EXPECTED.fullmatch(what):
        needed = " or ".join(_NEEDED.get(one, one) for one in expected[1].split(" | "))
        return f"{where}: {needed}{expected[2]} is needed, not {expected[3]}"
    return f"{where}: {what[0].lower()}{what[1:]}"
