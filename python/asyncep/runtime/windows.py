"""An endless stream in windows, each planned as a whole.

A window closes when it is full, or when the source is slow and nothing better is under way: then its first text does
not wait for the others. So a fast source gets large plans, and a slow one early answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from asyncep.runtime.loop import SourceRaised

T = TypeVar("T")
R = TypeVar("R")

WINDOW = 2048
# A slow source's window closes so long after its first text.
LINGER_SECONDS = 0.05


@dataclass(frozen=True)
class _Failed:
    """The source has raised."""

    error: BaseException


class _End:
    """The source has no more items."""


class _Source(Generic[T]):
    """Reads items ahead, as many as there is room for: a blocking iterator in a thread of its own, which nobody waits
    for when the stream is given up (it may be blocked for as long as it likes)."""

    def __init__(self, source: Iterable[T] | AsyncIterable[T], room: int) -> None:
        self._source, self._room = source, room
        self._items: deque[T | _Failed | type[_End]] = deque()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._space = threading.Semaphore(room)
        self._async_space = asyncio.Semaphore(room)
        self._stopped = False
        self._task: asyncio.Task[None] | None = None
        if isinstance(source, AsyncIterable):
            self._task = asyncio.create_task(self._read_async(source))
        else:
            threading.Thread(target=self._read, args=(source,), name="asyncep-source", daemon=True).start()

    async def wait(self, seconds: float | None = None) -> bool:
        """Waits until there is something new to take; False if there is nothing after so long."""
        self._changed.clear()
        if self._items:
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        return bool(self._items)

    def take(self, most: int) -> tuple[list[T], _Failed | type[_End] | None]:
        """Up to so many items that are there, and the end if it is reached."""
        taken: list[T] = []
        while self._items and len(taken) < most and not _is_end(self._items[0]):
            taken.append(self._items.popleft())  # type: ignore[arg-type] # not the end
            self._space.release()
            self._async_space.release()
        first = self._items[0] if self._items else None
        return taken, first if _is_end(first) else None  # type: ignore[return-value] # the end

    def stop(self) -> None:
        """Reads no further."""
        self._stopped = True
        self._space.release()
        if self._task is not None:
            self._task.cancel()

    def _put(self, item: T | _Failed | type[_End]) -> None:
        self._items.append(item)
        self._changed.set()

    def _hand_over(self, item: T | _Failed | type[_End]) -> None:
        # The loop may have been closed meanwhile, with the stream.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._put, item)

    def _read(self, source: Iterable[T]) -> None:
        items: Iterator[T] | None = None
        try:
            items = iter(source)
            while True:
                self._space.acquire()
                if self._stopped:
                    break
                item = next(items, _End)
                self._hand_over(item)
                if item is _End:
                    break
        except BaseException as error:
            self._hand_over(_Failed(error))
        finally:
            # A generator is closed by the thread that runs it.
            close: Any = getattr(items, "close", None)
            if self._stopped and close is not None:
                with contextlib.suppress(Exception):
                    close()

    async def _read_async(self, source: AsyncIterable[T]) -> None:
        try:
            async for item in source:
                await self._async_space.acquire()
                self._put(item)
            self._put(_End)
        except asyncio.CancelledError:
            if self._stopped:
                raise
            self._put(_Failed(RuntimeError("the source was cancelled")))
        except BaseException as error:
            self._put(_Failed(error))


async def in_order(
    source: Iterable[T] | AsyncIterable[T],
    work: Callable[[list[T]], Awaitable[list[R]]],
    *,
    size: int = WINDOW,
    ahead: int = 2,
    linger: float = LINGER_SECONDS,
) -> AsyncGenerator[R, None]:
    """What `work` makes of each window, item by item in the order of the source, as soon as it is there.

    Args:
        size: items of a window at most.
        ahead: windows under way at most. One more is being filled, and as many items as one has are read ahead.
        linger: seconds after its first item that a window waits for more while fewer windows are under way.

    Raises:
        what the source raises, after the answers to all that it gave before; as a `SourceRaised` what would end the
            loop, such as `SystemExit`.
    """
    items = _Source(source, size)
    under_way: deque[asyncio.Future[list[R]]] = deque()
    loop = asyncio.get_running_loop()
    window: list[T] = []
    began = 0.0
    ended: _Failed | type[_End] | None = None
    try:
        while True:
            taken, end = items.take(size - len(window))
            if taken and not window:
                began = loop.time()
            window += taken
            ended = end or ended
            late = began + linger - loop.time()
            if window and len(under_way) < ahead and (len(window) == size or ended or late <= 0):
                under_way.append(asyncio.ensure_future(work(window)))
                window = []
                continue
            if under_way and (under_way[0].done() or ended or len(window) == size):
                for result in await under_way.popleft():
                    yield result
                continue
            if ended and not window:
                break
            limit = max(0.0, late) if window and len(under_way) < ahead else None
            await _first(items, under_way[0] if under_way else None, limit)
        if isinstance(ended, _Failed):
            raise ended.error if isinstance(ended.error, Exception) else SourceRaised(ended.error)
    finally:
        items.stop()
        for task in under_way:
            task.cancel()


def _is_end(item: object) -> bool:
    return isinstance(item, _Failed) or item is _End


async def _first(items: _Source[Any], task: asyncio.Future[Any] | None, seconds: float | None) -> None:
    """Returns when there are new items, when the task is done, or after so long."""
    waiting = asyncio.ensure_future(items.wait(seconds))
    try:
        await asyncio.wait({waiting, *([task] if task else [])}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
