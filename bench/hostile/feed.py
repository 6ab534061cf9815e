"""Cases made in a process of their own, ahead of those who send them: making one costs more than sending it.

In the clients' own process it would hold up the well-behaved ones, whose waits are measured.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import queue
from collections import deque
from collections.abc import Sequence
from typing import Any

from hostile.cases import Case, endless
from hostile.schema import Route

_CHUNK, _CHUNKS_AHEAD = 100, 4
_LOOK_SECONDS = 0.5


class Feed:
    """What `endless` yields, one by one."""

    def __init__(self, routes: Sequence[Route], seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._queue: Any = context.Queue(_CHUNKS_AHEAD)
        self._process = context.Process(target=_make, args=(list(routes), seed, self._queue), daemon=True)
        self._ready: deque[Case] = deque()
        self._turn = asyncio.Lock()
        self._closed = False

    async def __aenter__(self) -> Feed:
        self._process.start()
        # The first ones take the longest; nothing has begun yet.
        try:
            self._ready.extend(await asyncio.to_thread(self._take))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        self._process.kill()
        await asyncio.to_thread(self._process.join)
        self._queue.cancel_join_thread()
        self._queue.close()

    def _take(self) -> list[Case]:
        """The next chunk. A thread that waited on without end would keep an interrupted run from ending.

        Raises:
            RuntimeError: the process that makes cases has ended.
        """
        while not self._closed and self._process.is_alive():
            try:
                chunk: list[Case] = self._queue.get(timeout=_LOOK_SECONDS)
                return chunk
            except queue.Empty:
                continue
        raise RuntimeError("the process that makes cases has ended")

    async def next(self) -> Case:
        async with self._turn:
            if not self._ready:
                self._ready.extend(await asyncio.to_thread(self._take))
            return self._ready.popleft()


def _make(routes: list[Route], seed: int, ready: Any) -> None:
    cases = endless(routes, seed)
    while True:
        ready.put(list(itertools.islice(cases, _CHUNK)))
