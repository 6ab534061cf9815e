"""Admission made awaitable: at most so many requests at once, the others wait, are refused or give up."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING

from asyncep_router.http.admission import Admission, Verdict
from asyncep_router.http.errors import QueueFull, QueueTimeout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class AdmissionGate:
    """`async with gate.enter(): ...` around the work on a request."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._numbers = count()
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[Verdict]:
        """Yields whether the request had to wait. Raises `QueueFull`, `QueueTimeout`."""
        loop = asyncio.get_running_loop()
        ident = next(self._numbers)
        verdict = self.admission.ask(ident, loop.time())
        if verdict is Verdict.FULL:
            raise QueueFull("too many requests wait already (--queue-size)")
        try:
            if verdict is Verdict.QUEUED:
                self._waiting[ident] = future = loop.create_future()
                self._pump()
                await future
            yield verdict
        finally:
            self._waiting.pop(ident, None)
            self.admission.leave(ident)
            self._pump()

    def _pump(self) -> None:
        if not self._waiting:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        admitted, expired = self.admission.poll(now)
        for ident in admitted:
            if not self._waiting[ident].done():
                self._waiting[ident].set_result(None)
        for ident in expired:
            if not self._waiting[ident].done():
                self._waiting[ident].set_exception(QueueTimeout("the request waited too long (--queue-timeout-secs)"))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self.admission.next_wakeup(now)
        if at is not None:
            self._timer = loop.call_at(at, self._pump)
