"""One declaration a setting: a field carries its flag, default, unit, bounds and help, and the parser is made of it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args

from asyncep_sgl.errors import UsageError

# Where the experts of a run lie, as far as flags depend on it.
Mode = Literal["memory", "hosts", "disk", "gpu", "cuda", "pinned"]
MODES: tuple[Mode, ...] = get_args(Mode)
_WHERE = {
    "memory": "all experts in this host's memory",
    "hosts": "several hosts (--nnodes)",
    "disk": "experts on disk (--asyncep-expert-memory on a CPU)",
    "gpu": "all experts in one GPU's memory",
    "cuda": "a part of the experts in each GPU's memory",
    "pinned": "experts in pinned host memory of a GPU server",
}
_Settings = TypeVar("_Settings")
_DECLARED = "declared"


@dataclass(frozen=True)
class Declared:
    """What a field says of its flag.

    Attributes:
        name: the flag, ``--asyncep-`` and the field's name where it is empty.
        metavar: the unit, as ``--help`` shows it; ``SIZE`` is a number of bytes such as ``64MiB``.
        help: without the default.
        choices: values that are taken; empty for any.
        kind: makes a value of the text; None is what the default is made of.
        least, above, most: bounds of a number.
        only: modes in which it means something; elsewhere it is refused.
        shown: the default in words, where it is not the field's.
    """

    name: str
    metavar: str
    help: str
    choices: tuple[str, ...] = ()
    kind: Callable[[str], Any] | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    only: tuple[Mode, ...] = MODES
    shown: str = ""


def setting(default: Any, metavar: str, text: str, *, name: str = "", **more: Any) -> Any:
    """A dataclass's field that is a flag; see `Declared` for the arguments."""
    return field(default=default, metadata={_DECLARED: Declared(name, metavar, text, **more)})


def declared(settings: type) -> Iterator[tuple[Field[Any], Declared]]:
    """Fields of a dataclass that are flags, each with its declaration, the flag's name filled in."""
    for one in fields(settings):
        found: Declared | None = one.metadata.get(_DECLARED)
        if found is not None:
            name = found.name or "--asyncep-" + one.name.replace("_", "-")
            yield one, replace(found, name=name)


def add_flags(group: argparse._ArgumentGroup, settings: type) -> None:
    """Adds a flag for each setting. What is not given is left out of what the parser finds."""
    for one, flag in declared(settings):
        words: dict[str, Any] = {"dest": _dest(flag), "default": argparse.SUPPRESS}
        words["help"] = flag.help + _default(one, flag)
        if one.default is False:
            group.add_argument(flag.name, action="store_true", **words)
            continue
        if one.default == () and flag.kind is None:
            words["nargs"] = "*"
        if flag.choices:
            words["choices"] = flag.choices
        else:
            words["metavar"] = flag.metavar
        group.add_argument(flag.name, type=_kind(one, flag), **words)


def read_flags(known: argparse.Namespace, settings: type[_Settings]) -> _Settings:
    """The settings of a parsed command line.

    Raises:
        UsageError: a value is out of bounds, naming its flag.
    """
    given: dict[str, Any] = {}
    for one, flag in declared(settings):
        if not hasattr(known, _dest(flag)):
            continue
        value = getattr(known, _dest(flag))
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(value, int | float):
            _check(flag, value)
        given[one.name] = value
    return settings(**given)


def meaningless(settings: object, modes: Collection[Mode]) -> Iterator[Declared]:
    """Flags with another value than the default that do nothing in any of the modes."""
    for flag in changed(settings):
        if not set(modes) & set(flag.only):
            yield flag


def changed(settings: object) -> Iterator[Declared]:
    """Flags with another value than the default."""
    return (flag for one, flag in declared(type(settings)) if getattr(settings, one.name) != one.default)


def useless(flag: Declared, mode: Mode) -> str:
    """Why a flag does nothing where the experts lie so."""
    where = " or ".join(_WHERE[one] for one in flag.only)
    return f"{flag.name}: only with {where}; here it is {_WHERE[mode]}"


def parse_size(text: str) -> int:
    """Bytes of a size such as ``64GiB``, ``500MB`` or ``1048576``.

    Raises:
        argparse.ArgumentTypeError: not a size.
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units[f"{letter}b"] = units[letter] = 1000**power
        units[f"{letter}ib"] = 1024**power
    number = text.strip().rstrip("bBiIkKmMgGtT")
    unit = text.strip()[len(number) :].lower()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write it as 64GiB, 500MB or a number of bytes"
        ) from None


def _check(flag: Declared, value: float) -> None:
    words = None
    if not math.isfinite(value):
        words = "a finite number"
    elif flag.least is not None and not value >= flag.least:
        words = f"at least {flag.least:g}"
    elif flag.above is not None and not value > flag.above:
        words = f"above {flag.above:g}"
    elif flag.most is not None and not value <= flag.most:
        words = f"at most {flag.most:g}"
    if words is not None:
        raise UsageError(f"{flag.name} {value}: must be {words}")


def _dest(flag: Declared) -> str:
    return "setting_" + flag.name.strip("-").replace("-", "_")


def _kind(one: Field[Any], flag: Declared) -> Callable[[str], Any]:
    if flag.kind is not None:
        return flag.kind
    if flag.metavar == "SIZE":
        return parse_size
    return str if one.default in ((), None, "") else type(one.default)


def _default(one: Field[Any], flag: Declared) -> str:
    default: Any = one.default
    if flag.shown:
        return f" (default: {flag.shown})"
    if default in ((), None, "") or default is False:
        return ""
    if flag.metavar == "SIZE":
        return f" (default {default >> 20}MiB)"
    return f" (default {default:,g})" if isinstance(default, float) else f" (default {default})"
