"""One place of SGLang that is hooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.plugins.hook_registry import HookType


class Seam(NamedTuple):
    """A place of SGLang that is hooked: what, how, with which parameters it was when this was written."""

    target: str
    hook: Callable[..., Any]
    kind: HookType
    parameters: tuple[str, ...]
