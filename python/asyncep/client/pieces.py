"""Many things in pieces that a server takes at once. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_pieces(items: Sequence[T], size_of: Callable[[T], int], *, most: int, most_size: int) -> Iterator[Sequence[T]]:
    """The items in runs of at most so many and of at most so much size together; a larger one stands by itself."""
    start = total = 0
    for number, item in enumerate(items):
        size = size_of(item)
        if number > start and (total + size > most_size or number - start == most):
            yield items[start:number]
            start, total = number, 0
        total += size
    if start < len(items):
        yield items[start:]
