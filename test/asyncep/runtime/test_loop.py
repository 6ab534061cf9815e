"""The loop in a thread: results, errors, iterators, and an end while work is under way."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from asyncep.runtime.loop import LoopThread
from asyncep.runtime.windows import in_order


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    if thread._thread.is_alive():
        thread.stop()


async def double(number: int) -> int:
    await asyncio.sleep(0)
    if number < 0:
        raise ValueError("below zero")
    return 2 * number


async def numbers(closed: list[bool]) -> AsyncIterator[int]:
    try:
        for number in range(5):
            await asyncio.sleep(0)
            yield number
    finally:
        closed.append(True)


def test_results_and_errors_cross_over(loop: LoopThread) -> None:
    assert loop.run(double(3)) == 6
    with pytest.raises(ValueError, match="below zero"):
        loop.run(double(-1))

    async def elsewhere() -> list[int]:
        return list(await asyncio.gather(*(loop.start(double(n)) for n in range(4))))

    assert asyncio.run(elsewhere()) == [0, 2, 4, 6]


def test_iterators_are_closed_when_they_are_left(loop: LoopThread) -> None:
    closed: list[bool] = []
    assert list(loop.iterate(numbers(closed))) == [0, 1, 2, 3, 4]
    half = loop.iterate(numbers(closed))
    assert [next(half), next(half)] == [0, 1]  # type: ignore[call-overload]
    half.close()  # type: ignore[attr-defined]
    assert closed == [True, True]

    async def elsewhere() -> list[int]:
        return [number async for number in loop.aiterate(numbers(closed))]

    assert asyncio.run(elsewhere()) == [0, 1, 2, 3, 4]


def test_what_is_under_way_at_the_end_is_cancelled(loop: LoopThread) -> None:
    closed: list[bool] = []
    left = loop.iterate(numbers(closed))
    next(left)
    begun = threading.Event()
    ended: list[type[BaseException]] = []

    async def forever() -> None:
        begun.set()
        await asyncio.Event().wait()

    def wait() -> None:
        try:
            loop.run(forever())
        except BaseException as error:
            ended.append(type(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    begun.wait()
    loop.stop()
    waiter.join()
    assert ended == [concurrent.futures.CancelledError]
    assert closed == [True]
    # Thrown away after the end: neither an error nor a wait for ever.
    left.close()  # type: ignore[attr-defined]


def collect(source: Iterator[int], found: list[int]) -> None:
    for item in source:
        found.append(item)


async def slow_work(window: list[int]) -> list[int]:
    try:
        await asyncio.sleep(600)
    finally:
        # Cancelling takes a while, as that of a request does.
        for _ in range(20):
            await asyncio.sleep(0)
    return window


@pytest.mark.parametrize("source", [[1, 2, 3], range(10**6)])
def test_leaving_a_stream_while_it_is_awaited_raises_what_the_caller_was_told(loop: LoopThread, source: object) -> None:
    stream = loop.iterate(in_order(iter(source), slow_work))  # type: ignore[call-overload]
    raised: list[type[BaseException]] = []
    begun = threading.Event()

    def wait() -> None:
        begun.set()
        try:
            next(stream)
        except BaseException as error:
            raised.append(type(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    begun.wait()
    while not any("slow_work" in repr(task) for task in asyncio.all_tasks(loop._loop)):
        time.sleep(0.001)
    # What Ctrl-C does to a thread that waits.
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(waiter.ident or 0), ctypes.py_object(KeyboardInterrupt))
    waiter.join(1.0)
    if waiter.is_alive():
        # The exception is raised when the wait ends: the stream's task is cancelled for it.
        for task in asyncio.all_tasks(loop._loop):
            loop._loop.call_soon_threadsafe(task.cancel)
        waiter.join(60)
    assert raised in ([KeyboardInterrupt], [concurrent.futures.CancelledError])
    assert loop.run(double(1)) == 2

    async def elsewhere() -> None:
        other = loop.aiterate(in_order(iter(source), slow_work))  # type: ignore[call-overload]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(other), 0.1)

    asyncio.run(elsewhere())
    assert loop.run(double(2)) == 4


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_what_would_end_the_loop_is_raised_where_it_belongs(loop: LoopThread, error: BaseException) -> None:
    def source() -> Iterator[int]:
        yield 1
        raise error

    async def work(window: list[int]) -> list[int]:
        return window

    found: list[int] = []
    with pytest.raises(type(error)):
        collect(loop.iterate(in_order(source(), work)), found)
    assert found == [1]
    assert loop.run(double(1)) == 2


def test_a_source_that_is_cancelled_itself_is_an_error(loop: LoopThread) -> None:
    async def source() -> AsyncIterator[int]:
        yield 1
        task = asyncio.create_task(asyncio.sleep(600))
        task.cancel()
        await task

    async def work(window: list[int]) -> list[int]:
        return window

    found: list[int] = []
    with pytest.raises(RuntimeError, match="the source was cancelled"):
        collect(loop.iterate(in_order(source(), work)), found)
    assert found == [1]


def test_a_stream_may_be_thrown_away_in_the_loops_own_thread(loop: LoopThread) -> None:
    closed: list[bool] = []
    streams = [loop.iterate(numbers(closed))]
    next(streams[0])

    async def throw_away() -> None:
        streams.pop().close()  # type: ignore[attr-defined]
        while not closed:
            await asyncio.sleep(0)

    loop.run(throw_away())
    assert closed == [True]
