"""Hashes of a prompt's leading blocks, each covering everything before it.

Two prompts have the same i-th hash exactly if their first i blocks are equal (64-bit hashes; a collision
misplaces a request, nothing worse). Values differ between processes; only equality means anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from array import array


def block_chain(token_ids: array[int], block: int, namespace: str | None = None) -> tuple[int, ...]:
    """One hash per whole block of `block` tokens."""
    width = block * token_ids.itemsize
    data = token_ids.tobytes()
    link = hash(namespace)
    chain = []
    for start in range(0, len(data) - width + 1, width):
        link = hash((link, data[start : start + width]))
        chain.append(link)
    return tuple(chain)
