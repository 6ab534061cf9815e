"""Values that a field may be hurt by: the extremes of what its schema says, and what it does not say. Pure.

Values are JSON *text*, since NaN, Infinity, lone surrogates and deep nesting have no safe form in Python's objects.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from hostile.schema import alternatives

DEEP = 900
LONG = 100_000
MANY = 20_000
# Ends of the integers that ranks, torch and C hold, and what no float does.
INTEGERS = (
    *("0", "-1", "1", "2", "7", "1000000", "2147483647", "2147483648", "-2147483648", "-2147483649"),
    *("4294967296", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1" + "0" * 400),
)
NUMBERS = ("0.0", "-0.0", "0.5", "2.5", "1e-320", "-1e-9", "1e308", "-1e308", "1e999", "NaN", "Infinity", "-Infinity")
# JSON escapes, as the wire has them: a lone surrogate, a zero byte, a character of four bytes, a right-to-left mark.
STRINGS = (
    '""',
    '" "',
    '"a"',
    r'"\ud83d"',
    r'"\udc00\ud800"',
    r'"a\u0000b"',
    '"\U0001f600"',
    r'"\u202e"',
    '"../../etc"',
)
PATTERNS = ('"("', '"(a*)*b"', '"{}"', '"root ::= root"', '"{\\"type\\": 5}"', '"<start><end>"', '"[a-z]{1,100000}"')
_LONG_STRINGS = ('"' + "x" * LONG + '"', '"' + "a " * (LONG // 2) + '"')
_MANY_KEYS = "{" + ",".join(f'"k{number}":{number}' for number in range(MANY // 10)) + "}"
WRONG = ("null", "true", "false", "5", "-3.5", '"word"', "[]", "{}", "[[]]", "[null]", '{"a": {"b": []}}', "[{}]")


def text(value: Any) -> str:
    """A value's JSON text."""
    return json.dumps(value, ensure_ascii=True)


def nested(opening: str, inner: str, closing: str, depth: int = DEEP) -> str:
    """``inner`` inside ``depth`` arrays or objects."""
    return opening * depth + inner + closing * depth


_NESTED = (nested("[", "1", "]"), nested('{"a":', "1", "}"))


@lru_cache(256)
def lists_of(inner: str) -> tuple[str, ...]:
    """Lists of no length that fits: empty, of one, of three (two prompts are sent at most), many, lists in lists."""
    return "[]", f"[{inner}]", f"[{inner},{inner},{inner}]", "[" + ",".join([inner] * MANY) + "]", f"[[{inner}]]"


def extremes(schema: Mapping[str, Any]) -> list[str]:
    """Every value worth sending for a field, as JSON text, once each and in a fixed order."""
    return list(dict.fromkeys(_extremes(schema)))


def _extremes(schema: Mapping[str, Any]) -> Iterator[str]:
    for part in alternatives(schema):
        yield from _of_type(part)
    yield from WRONG
    yield from _NESTED


def _of_type(part: Mapping[str, Any]) -> Iterator[str]:
    kind = part.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    for value in (*part.get("enum", ()), *([part["const"]] if "const" in part else ()), *part.get("examples", ())):
        yield text(value)
    if kinds == [None] and "properties" not in part:
        # The schema allows anything: so is everything sent.
        kinds = ["integer", "number", "string", "array", "object"]
    for one in kinds:
        if one == "integer":
            yield from INTEGERS
            yield from ("1.5", "1e400")
        elif one == "number":
            yield from (*NUMBERS, *INTEGERS)
        elif one == "string":
            yield from (*STRINGS, *PATTERNS)
            yield from _LONG_STRINGS
        elif one == "array":
            items = part.get("items") or {}
            for inner in _some(items):
                yield from lists_of(inner)
        elif one == "object":
            yield from ("{}", '{"":null}', '{"a":NaN}', r'{"\ud83d":1}')
            yield _MANY_KEYS
            inside = part.get("additionalProperties")
            if isinstance(inside, Mapping) and inside:
                yield from (f'{{"5":{value},"-1":{value},"x":{value}}}' for value in _some(inside))


def _some(schema: Mapping[str, Any]) -> list[str]:
    """A few values of a list's items: one that is honest and those most likely to hurt."""
    found = []
    for part in alternatives(schema):
        kind = part.get("type")
        if kind in ("integer", "number"):
            found += ["5", "-1", "2147483648", "9223372036854775808", "NaN"]
        elif kind == "string":
            found += ['"a"', '""', r'"\ud83d"']
        elif kind == "boolean":
            found += ["true"]
        elif kind == "array":
            found += ["[]", *(f"[{inner}]" for inner in _some(part.get("items") or {})[:3])]
        elif kind == "object" or "properties" in part:
            found += ["{}", example(part)]
    return list(dict.fromkeys(found)) or ["null", "1", '"a"', "{}"]


def example(schema: Mapping[str, Any], depth: int = 4) -> str:
    """The plainest value that a schema allows, as JSON text: what a request that must have the field sends."""
    for part in alternatives(schema):
        if "const" in part:
            return text(part["const"])
        if part.get("enum"):
            return text(part["enum"][0])
        kind = part.get("type")
        if kind == "string":
            return '"a b"'
        if kind in ("integer", "number"):
            return "1"
        if kind == "boolean":
            return "false"
        if kind == "array":
            return f"[{example(part.get('items') or {}, depth - 1)}]" if depth else "[]"
        if kind == "object" or "properties" in part:
            needed = part.get("required", ()) if depth else ()
            inside = (f"{text(name)}:{example(part['properties'].get(name, {}), depth - 1)}" for name in needed)
            return "{" + ",".join(inside) + "}"
    return '"a"'
