"""What of a worker's answers about itself clients may see: no keys, no paths of the server. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_SECRET = re.compile(r"secret|passw|passphrase|credential|api_?key|(?:^|[_-])keys?(?:$|[_-])|key$|cookie", re.I)
_PERHAPS = re.compile(r"key|token|auth|private|cert", re.I)
_NOT_TOKENS = re.compile(r"(?:de)?tokeniz(?:er|ed|e)", re.I)
_PATH = re.compile(r"(?:/|~/|[A-Za-z]:[\\/]|file://)")
_DEEPEST = 32
_SHORTEST_SECRET = 6
HIDDEN = "(hidden)"


def public(value: Any, secrets: Iterable[str] = (), *, paths: bool = False, depth: int = 0) -> Any:
    """A JSON value as clients may see it.

    Fields whose name speaks of a key, secret or password are left out, those that speak of tokens unless they hold
    only numbers. A path of the server's file system becomes its last part, unless `paths` may be seen. Text that
    contains one of `secrets` is hidden. What lies deeper than 32 levels is left out.
    """
    if isinstance(value, dict):
        if depth >= _DEEPEST:
            return {}
        return {
            name: public(entry, secrets, paths=paths, depth=depth + 1)
            for name, entry in value.items()
            if not secret(name, entry) and not _contains(name, secrets)
        }
    if isinstance(value, list):
        return [public(entry, secrets, paths=paths, depth=depth + 1) for entry in value] if depth < _DEEPEST else []
    if not isinstance(value, str):
        return value
    if _contains(value, secrets):
        return HIDDEN
    return value if paths else public_name(value)


def secret(name: str, value: Any) -> bool:
    """Whether a field may hold a secret."""
    name = _NOT_TOKENS.sub("", name)
    return bool(_SECRET.search(name)) or (bool(_PERHAPS.search(name)) and not _numbers(value))


def public_name(value: str | None) -> str | None:
    """A model's name as clients may see it: a path of the server's file system becomes its last part."""
    if value is None or not _PATH.match(value):
        return value
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1]


def _numbers(value: Any) -> bool:
    """Whether it is a number, a truth value, nothing, or a list of those."""
    if isinstance(value, list):
        return all(entry is None or isinstance(entry, int | float) for entry in value)
    return value is None or isinstance(value, int | float)


def _contains(text: str, secrets: Iterable[str]) -> bool:
    # A secret of one or two letters would hide every text.
    return any(len(entry) >= _SHORTEST_SECRET and entry in text for entry in secrets)
