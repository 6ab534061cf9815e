"""The loop in a thread: results, errors, iterators, and an end while work is under way."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from asyncep.runtime.loop import LoopThread


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
