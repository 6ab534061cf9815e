"""An endless stream in pieces: a window is planned as a whole, and the next is under way while one is awaited. Pure."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

WINDOW = 2048


async def windows(source: Iterable[T] | AsyncIterable[T], size: int) -> AsyncIterator[list[T]]:
    """Lists of `size` items, the last perhaps shorter. A blocking iterator is read in a thread."""
    if isinstance(source, AsyncIterable):
        window: list[T] = []
        async for item in source:
            window.append(item)
            if len(window) == size:
                yield window
                window = []
        if window:
            yield window
        return
    items = iter(source)

    def take() -> list[T]:
        return list(islice(items, size))

    while window := await asyncio.to_thread(take):
        yield window


async def in_order(
    source: AsyncIterator[list[T]], work: Callable[[list[T]], Awaitable[list[R]]], *, ahead: int = 2
) -> AsyncIterator[R]:
    """What `work` makes of each window, item by item in the order of the source; `ahead` windows are under way."""
    under_way: deque[asyncio.Future[list[R]]] = deque()
    try:
        async for window in source:
            under_way.append(asyncio.ensure_future(work(window)))
            if len(under_way) == ahead:
                for result in await under_way.popleft():
                    yield result
        while under_way:
            for result in await under_way.popleft():
                yield result
    finally:
        for task in under_way:
            task.cancel()
