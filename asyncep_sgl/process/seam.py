"""One place of SGLang that is hooked, and whether all that were asked for are.

SGLang only logs a hook that fails to apply, which would serve every expert replicated without a word;
`assert_active` turns that into an error with the seam's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from sglang.srt.plugins.hook_registry import HookRegistry, HookType


class Seam(NamedTuple):
    """A place of SGLang that is hooked: what, how, with which parameters it was when this was written."""

    target: str
    hook: Callable[..., Any]
    kind: HookType
    parameters: tuple[str, ...]


_asked_for: list[str] = []
_complete = False


def hook(seams: Iterable[Seam]) -> None:
    """Asks SGLang to hook these when it has loaded its plug-ins."""
    for seam in seams:
        HookRegistry.register(seam.target, seam.hook, seam.kind)
        _asked_for.append(seam.target)


def hooked_all() -> None:
    """The plug-in has asked for all of its hooks."""
    global _complete
    _complete = True


def assert_active() -> None:
    """Checks that every seam is hooked in this process.

    Raises:
        SystemExit: one is not, named; serving on would silently do without it.
    """
    missing = [target for target in _asked_for if target not in HookRegistry._patched]
    if missing or not _complete:
        # What a plug-in raises while it is registered, SGLang only logs.
        which = missing[0] if missing else "processes, for a reason that SGLang has logged,"
        raise SystemExit(f"asyncep: SGLang's {which} could not be hooked; is the pinned sglang==0.5.23 installed?")
