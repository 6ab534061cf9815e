"""Keeps keys out of `ps`: the process's command line is shown with its keys masked."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

MASK = "***"


def masked(arguments: Sequence[str], flags: Iterable[str]) -> list[str]:
    """A command line whose values of `flags` are masked; the name of a file, `@FILE`, may be seen."""
    flags = frozenset(flags)
    shown: list[str] = []
    hide = False
    for word in arguments:
        flag, equals, value = word.partition("=")
        if hide and not word.startswith("@"):
            word = MASK
        elif equals and flag in flags and not value.startswith("@"):
            word = f"{flag}={MASK}"
        hide = not hide and word in flags
        shown.append(word)
    return shown


def hide_keys(flags: Iterable[str]) -> None:
    """Mask this process's own command line, if a key stands in it and the library for that is installed."""
    shown = masked(sys.argv[1:], flags)
    if shown == sys.argv[1:]:
        return
    try:
        from setproctitle import setproctitle
    except ImportError:
        return
    setproctitle(" ".join([sys.executable, *sys.argv[:1], *shown]))
