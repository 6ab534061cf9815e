"""Streams: slow sources, failing sources, sources that are given up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from asyncep.runtime.windows import in_order


async def doubled(window: list[int]) -> list[int]:
    await asyncio.sleep(0)
    return [2 * item for item in window]


def test_a_slow_source_is_answered_while_it_goes_on() -> None:
    released = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        yield 2
        # The rest comes only when the first answers have been seen.
        assert released.wait(60)
        yield 3

    async def run() -> list[int]:
        found = []
        async for result in in_order(source(), doubled):
            found.append(result)
            if len(found) == 2:
                released.set()
        return found

    assert asyncio.run(run()) == [2, 4, 6]


def test_an_asynchronous_source_likewise() -> None:
    async def run() -> list[int]:
        released = asyncio.Event()

        async def source() -> AsyncIterator[int]:
            yield 1
            await released.wait()
            yield 2

        found = []
        async for result in in_order(source(), doubled):
            found.append(result)
            released.set()
        return found

    assert asyncio.run(run()) == [2, 4]


def test_a_fast_source_fills_its_windows() -> None:
    sizes: list[int] = []

    async def work(window: list[int]) -> list[int]:
        sizes.append(len(window))
        await asyncio.sleep(0.05)
        return window

    async def run() -> list[int]:
        return [result async for result in in_order(iter(range(1000)), work, size=100)]

    assert asyncio.run(run()) == list(range(1000))
    assert sizes.count(100) >= 8


@pytest.mark.parametrize("given", [0, 1, 5, 250])
def test_what_a_source_raises_comes_after_the_answers_to_what_it_gave(given: int) -> None:
    def source() -> Iterator[int]:
        yield from range(given)
        raise LookupError("the source is broken")

    found: list[int] = []

    async def run() -> None:
        async for result in in_order(source(), doubled, size=100):
            found.append(result)

    with pytest.raises(LookupError, match="the source is broken"):
        asyncio.run(run())
    assert found == [2 * i for i in range(given)]


def test_a_failure_of_the_work_is_raised_and_stops_the_reading() -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            closed.set()

    async def work(window: list[int]) -> list[int]:
        raise RuntimeError("no server")

    async def run() -> None:
        async with contextlib.aclosing(in_order(source(), work, size=10)) as results:
            async for _ in results:
                pass

    with pytest.raises(RuntimeError, match="no server"):
        asyncio.run(run())
    assert closed.wait(60)


def test_closing_does_not_wait_for_the_source() -> None:
    blocked, released, closed = threading.Event(), threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        try:
            yield 1
            blocked.set()
            released.wait(120)
            yield 2
        finally:
            closed.set()

    async def run() -> float:
        async with contextlib.aclosing(in_order(source(), doubled, size=1)) as results:
            async for _ in results:
                await asyncio.to_thread(blocked.wait, 60)
                break
            began = time.monotonic()
        return time.monotonic() - began

    # The source stays blocked: closing that waited for it would take two minutes.
    assert asyncio.run(run()) < 60
    assert not closed.is_set()
    released.set()
    assert closed.wait(60)


def test_closing_cancels_what_is_under_way() -> None:
    ended: list[str] = []

    async def run() -> None:
        started = asyncio.Event()

        async def work(window: list[int]) -> list[int]:
            if window == [1]:
                await started.wait()
                return window
            started.set()
            try:
                await asyncio.sleep(600)
            finally:
                ended.append("cancelled")
            return window

        async with contextlib.aclosing(in_order(iter([1, 2]), work, size=1)) as results:
            async for _ in results:
                break
        await asyncio.sleep(0)

    asyncio.run(run())
    assert ended == ["cancelled"]
