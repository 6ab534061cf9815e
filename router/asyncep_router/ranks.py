"""Sets of ranks as the bits of an integer: bit r set means rank r is a member.

One `&` answers "which ranks hold this prefix and have room" for 64 ranks as for one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def members(mask: int) -> Iterator[int]:
    """The ranks in a set, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
