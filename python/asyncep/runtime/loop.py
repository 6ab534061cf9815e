"""An event loop in a thread, so that the same coroutines serve callers with and without a loop of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")

_END = object()


class LoopThread:
    """Runs coroutines for other threads and for other loops.

    Args:
        explain: makes the error that a caller gets out of the one that was raised.
    """

    def __init__(self, explain: Callable[[Exception], Exception] = lambda error: error) -> None:
        self._explain = explain
        self._closing: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="asyncep-runtime", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs it and waits, blocking the thread that calls. Ctrl-C there cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except Exception as error:
            future.cancel()
            self._raise(error)
        except BaseException:
            future.cancel()
            raise

    def start(self, work: Coroutine[Any, Any, T]) -> Awaitable[T]:
        """Starts it; the caller's loop may await the result, and cancelling that cancels it."""
        future = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
        return asyncio.ensure_future(self._result(future))

    async def _result(self, future: asyncio.Future[T]) -> T:
        try:
            return await future
        except Exception as error:
            self._raise(error)

    def _raise(self, error: Exception) -> NoReturn:
        explained = self._explain(error)
        if explained is error:
            raise error
        raise explained from error

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """Its items, for a thread without a loop."""
        items = _Items(source)
        try:
            while (item := self.run(items.next())) is not _END:
                yield item  # type: ignore[misc] # not the end
        except SourceRaised as raised:
            raise raised.error from None
        finally:
            # An iterator that was left half-way may be thrown away after the runtime has ended, or by the collector
            # in the loop's own thread, which cannot wait for itself.
            if threading.current_thread() is self._thread:
                self._closing.add(task := self._loop.create_task(items.close()))
                task.add_done_callback(self._closing.discard)
            elif not self._loop.is_closed():
                self.run(items.close())

    async def aiterate(self, source: AsyncIterator[T]) -> AsyncIterator[T]:
        """Its items, for another loop."""
        items = _Items(source)
        try:
            while (item := await self.start(items.next())) is not _END:
                yield item  # type: ignore[misc] # not the end
        except SourceRaised as raised:
            raise raised.error from None
        finally:
            if not self._loop.is_closed():
                await self.start(items.close())

    def stop(self) -> None:
        """Cancels what is under way and ends the thread."""
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class SourceRaised(Exception):
    """A caller's iterator has raised what would end the loop; its caller gets it as it was.

    Attributes:
        error: what was raised.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(repr(error))
        self.error = error


class _Items(Generic[T]):
    """An asynchronous iterator's items, asked for one at a time. Closing ends the one that is being asked for first."""

    def __init__(self, source: AsyncIterator[T]) -> None:
        self._source = source
        self._asked: asyncio.Task[T | object] | None = None

    async def next(self) -> T | object:
        self._asked = asyncio.create_task(self._next())
        return await self._asked

    async def close(self) -> None:
        if self._asked is not None and not self._asked.done():
            self._asked.cancel()
            await asyncio.wait((self._asked,))
        close = getattr(self._source, "aclose", None)
        if close is not None:
            await close()

    async def _next(self) -> T | object:
        return await anext(self._source, _END)


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
