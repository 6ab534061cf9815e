"""The smallest request that still does it, and that as a command to paste."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

from hostile.cases import Case

# Of a body's text; longer runs of the same are written as a product.
_LONGEST = 600
_RUN = re.compile(r"(.{1,60}?)\1{15,}", re.DOTALL)


async def smallest(case: Case, still: Callable[[Case], Awaitable[bool]], tries: int = 60) -> Case:
    """A case as small as can be found in so many tries for which ``still`` holds.

    Args:
        case: one for which it holds.
        still: asks whether a smaller one does it too.
    """
    content = _loaded(case)
    if content is None:
        return case
    smaller, progress = content[0], True
    while progress and tries > 0:
        progress = False
        for candidate in simpler(smaller):
            if tries <= 0:
                break
            tries -= 1
            if await still(_holding(case, candidate)):
                smaller, progress = candidate, True
                break
    return _holding(case, smaller)


def _loaded(case: Case) -> tuple[Any] | None:
    """The body as a value, in a tuple of its own; None where it is not JSON."""
    try:
        return (json.loads(case.content),)
    except (ValueError, RecursionError):
        return None


def _holding(case: Case, value: Any) -> Case:
    return replace(case, body=json.dumps(value).encode())


def size(value: Any) -> int:
    """What shrinking makes less of."""
    return len(json.dumps(value))


def simpler(value: Any, depth: int = 5) -> Iterator[Any]:
    """Values that are a step simpler, the boldest first; each is smaller than ``value``."""
    before = size(value)
    for candidate in _steps(value, depth):
        if size(candidate) < before:
            yield candidate


def _steps(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, dict):
        for key in value:
            yield {name: inner for name, inner in value.items() if name != key}
        for key, inner in value.items() if depth else ():
            for less in simpler(inner, depth - 1):
                yield {**value, key: less}
    elif isinstance(value, list):
        half = len(value) // 2
        yield from ([], value[:half], value[half:])
        if len(value) <= 8:
            yield from (value[:at] + value[at + 1 :] for at in range(len(value)))
        for at, inner in enumerate(value[:2] if depth else ()):
            for less in simpler(inner, depth - 1):
                yield [*value[:at], less, *value[at + 1 :]]
    elif isinstance(value, str):
        half = len(value) // 2
        yield from ("", "a", value[:half], value[half:])
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from (0, 1, -1)


def curl(case: Case, url: str, key: str = "$KEY") -> str:
    """A shell command that sends the case; long repetitions are made by Python."""
    parts = ["curl", "-sS", "-i", "-X", case.method, shlex.quote(url + case.path + case.query)]
    headers = {"content-type": "application/json", **dict(case.headers)}
    for name, value in headers.items():
        parts += ["-H", shlex.quote(f"{name}: {value[:200]}")]
    parts += ["-H", f'"authorization: Bearer {key}"']
    if not case.content:
        return " ".join(parts)
    body = case.content.decode("utf-8", "backslashreplace")
    if len(body) <= _LONGEST:
        return " ".join([*parts, "--data-binary", shlex.quote(body)])
    return f"python3 -c {shlex.quote(f'print({_product(body)}, end=str())')} | " + " ".join(
        [*parts, "--data-binary", "@-"]
    )


def _product(body: str) -> str:
    """A Python expression for ``body`` in which runs of the same are products."""
    parts, at = [], 0
    for run in _RUN.finditer(body):
        unit = run.group(1)
        parts += [repr(body[at : run.start()]), f"{unit!r} * {len(run.group(0)) // len(unit)}"]
        at = run.end()
    return " + ".join(part for part in [*parts, repr(body[at:])] if part != "''")
