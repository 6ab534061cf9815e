"""What a caller says of a server in Python, as its command line, environment and URL have it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from asyncep.client.errors import OptionError
from asyncep_router.errors import ConfigError
from asyncep_router.keys import key_from

_FLAG = re.compile(r"(\([^)]*\))|(?<![\w-])--(?!help\b)([a-z][a-z0-9-]*)")
# A line of ours, which may begin with the command.
_OURS = re.compile(r"(asyncep[^:]*: )?--")


def without_password(url: str | None) -> str:
    """A URL without a password in it."""
    return re.sub(r"//[^/@]*@", "//", url or "")


def in_python(message: str) -> str:
    """Lines of ours about flags of ``asyncep serve``, as arguments of Python are written; what is in brackets stays."""
    return "\n".join(_FLAG.sub(_argument, line) if _OURS.match(line) else line for line in message.split("\n"))


def _argument(found: re.Match[str]) -> str:
    if found[1]:
        return found[1]
    return "model" if found[2] == "model-path" else found[2].replace("-", "_")


def key_of(argument: str, given: str | None, variable: str) -> str | None:
    """A key, or the environment's.

    Raises:
        OptionError: its file cannot be read; names the argument.
    """
    try:
        return key_from(given, variable)
    except ConfigError as error:
        raise OptionError(f"{argument}: {error}") from error


def flags_of(options: Mapping[str, Any]) -> list[str]:
    """Keyword arguments as flags of ``asyncep serve``."""
    flags: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        flags.append(flag)
        if isinstance(value, list | tuple):
            flags += map(str, value)
        elif value is not True:
            flags.append(str(value))
    return flags
