"""How keys get from the launcher to the front without standing where other programs may show them."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import msgspec

from asyncep_router.keys import Caller, Keys
from asyncep_sgl.process.segment import OwnedSegment

KEY_VARIABLE, ADMIN_KEY_VARIABLE = "ASYNCEP_API_KEY", "ASYNCEP_ADMIN_API_KEY"
KEY_FLAGS = ("--api-key", "--admin-api-key")


def hand_on(keys: Keys) -> OwnedSegment:
    """Puts keys into the launcher's memory, where only processes of the same user can read them.

    The server's processes have them neither in their command lines nor in their environment.
    """
    text = msgspec.json.encode(keys.holders)
    segment = OwnedSegment("keys", max(len(text), mmap.PAGESIZE))
    Path(segment.path).write_bytes(text)
    return segment


def read_keys(path: str) -> Keys:
    """The keys that `hand_on` has put there."""
    text = Path(path).read_bytes().rstrip(b"\0")
    return Keys(msgspec.json.decode(text, type=dict[str, Caller]))


def without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """The launcher's environment for the processes that it starts."""
    return {name: value for name, value in environment.items() if name not in (KEY_VARIABLE, ADMIN_KEY_VARIABLE)}
