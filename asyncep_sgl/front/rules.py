"""What the value of a request's field may be. Each rule says what is wrong with a value, or nothing. Pure.

Ranks keep numbers in fixed widths and decode messages strictly: a value outside its type would not be an error of the
request there but the end of the rank. So types are exact: ``True`` is no number and ``1.0`` no whole number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rule = Callable[[Any], str | None]
"""Takes a value that is not None; answers what is needed instead, or None if the value is good."""


def shown(value: Any) -> str:
    """A value as an error shows it: short, whatever a client has sent."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}…"


def whole(least: int, most: int) -> Rule:
    """A whole number of ``least`` to ``most``, both included."""

    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            return f"{shown(value)}: a whole number from {least} to {most} is needed"
        return None

    return check


def number(least: float, most: float, *, above: bool = False) -> Rule:
    """A finite number of ``least`` to ``most``; ``above`` leaves ``least`` itself out."""

    def check(value: Any) -> str | None:
        good = not isinstance(value, bool) and isinstance(value, int | float)
        if not good or not least <= value <= most or (above and value == least):
            return f"{shown(value)}: a number {'above' if above else 'from'} {least:g} to {most:g} is needed"
        return None

    return check


def flag(value: Any) -> str | None:
    """``true`` or ``false``."""
    return None if isinstance(value, bool) else f"{shown(value)}: true or false is needed"


def text(most: int) -> Rule:
    """A string of at most ``most`` characters, each one Unicode allows (no lone surrogates)."""

    def check(value: Any) -> str | None:
        if not isinstance(value, str):
            return f"{shown(value)}: a string is needed"
        if len(value) > most:
            return f"a string of {len(value)} characters: at most {most} are taken"
        return not_unicode(value)

    return check


def not_unicode(value: str) -> str | None:
    """What is wrong with a string that no encoding can carry."""
    if value.isascii():
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start} is half of a surrogate pair, which is no text"
    return None


def list_of(rule: Rule, most: int) -> Rule:
    """A list of at most ``most`` values that each keep to ``rule``."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list | tuple):
            return f"{shown(value)}: a list is needed"
        if len(value) > most:
            return f"a list of {len(value)} entries: at most {most} are taken"
        for place, entry in enumerate(value):
            if entry is None:
                return f"entry {place} is null"
            if (wrong := rule(entry)) is not None:
                return f"entry {place}: {wrong}"
        return None

    return check


def one_or_list(rule: Rule, most: int) -> Rule:
    """A value, or a list of at most ``most`` of them."""
    several = list_of(rule, most)
    return lambda value: several(value) if isinstance(value, list | tuple) else rule(value)


def keyed(key: Callable[[str], bool], rule: Rule, most: int, what: str) -> Rule:
    """An object of at most ``most`` entries whose keys satisfy ``key`` and whose values keep to ``rule``."""

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f"{shown(value)}: an object is needed"
        if len(value) > most:
            return f"an object of {len(value)} entries: at most {most} are taken"
        for name, entry in value.items():
            if not isinstance(name, str) or not key(name):
                return f"key {shown(name)}: {what} is needed"
            if entry is None or (wrong := rule(entry)) is not None:
                return f"{shown(name)}: {'null' if entry is None else wrong}"
        return None

    return check


@dataclass(frozen=True)
class Refused:
    """A rule for a field that is not served: takes only what asks for nothing. Such a field is to be reset.

    Clients send an empty list or ``false`` for what they do not want; a rank may not be able to hold it.

    Attributes:
        reason: why it is not served, or what to use instead.
        unless: values beside empty ones and ``false`` that ask for nothing.
    """

    reason: str
    unless: tuple[Any, ...] = ()

    def __call__(self, value: Any) -> str | None:
        """What is wrong with a value."""
        asks_nothing = value is False or (isinstance(value, str | list | tuple | dict) and not value)
        if asks_nothing or any(type(value) is type(one) and value == one for one in self.unless):
            return None
        return f"not served here: {self.reason}"
