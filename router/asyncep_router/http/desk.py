"""Where requests wait for a rank: the pure policy made awaitable. One event loop, no threads."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from asyncep_router.http.errors import NoWorker, QueueTimeout, Refusal
from asyncep_router.messages import BatchReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncep_router.messages import Dispatch, Request
    from asyncep_router.policy import Policy


class Waiter:
    """One client request's prompts on their way to ranks; they may leave together or one by one."""

    __slots__ = ("_arrived", "_error", "_expected", "_wake", "requests")

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self._expected = len(requests)
        self._arrived: list[Dispatch] = []
        self._error: Refusal | None = None
        self._wake: asyncio.Future[None] | None = None

    def deliver(self, dispatch: Dispatch) -> None:
        """A rank is found for one of them."""
        self._arrived.append(dispatch)
        self._stir()

    def fail(self, error: Refusal) -> None:
        """No rank will be found."""
        self._error = error
        self._stir()

    @property
    def open(self) -> bool:
        """Whether any prompt still waits or was not taken out by `take`."""
        return self._expected > 0

    def abandon_arrived(self, policy: Policy) -> None:
        """Give back what was dispatched and never taken."""
        for dispatch in self._arrived:
            policy.abandon(dispatch.rid)
        self._arrived = []

    async def take(self, until: float) -> list[Dispatch]:
        """Those dispatched since the last call, at least one. Raises `QueueTimeout`, `NoWorker`."""
        if not self._arrived and self._error is None:
            loop = asyncio.get_running_loop()
            self._wake = loop.create_future()
            try:
                async with asyncio.timeout_at(until):
                    await self._wake
            except TimeoutError:
                raise QueueTimeout("no rank had room in time (--queue-timeout-secs)") from None
            finally:
                self._wake = None
        if not self._arrived and self._error is not None:
            raise self._error
        taken, self._arrived = self._arrived, []
        self._expected -= len(taken)
        return taken

    def _stir(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class Desk:
    """Submits, polls after every event, and wakes whoever got a rank.

    `on_decision` sees every dispatch and the seconds its decision took.
    """

    def __init__(self, policy: Policy, on_decision: Callable[[Dispatch], None]) -> None:
        self.policy = policy
        self._on_decision = on_decision
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.on_latency: Callable[[float], None] = lambda seconds: None
        """Told the seconds that every placing of new requests took."""
        self.refusal: NoWorker | None = None
        """While set, nothing waits: requests are refused with it."""

    @staticmethod
    def now() -> float:
        """The clock of everything here, seconds."""
        return asyncio.get_running_loop().time()

    def submit(self, requests: Sequence[Request]) -> Waiter:
        """Let requests wait for ranks. Raises `NoWorker`."""
        if self.refusal is not None:
            raise self.refusal
        waiter = Waiter(requests)
        now = self.now()
        started = time.perf_counter()
        for request in requests:
            request.payload = waiter
            self.policy.submit(request, now)
        self.pump(now)
        self.on_latency(time.perf_counter() - started)
        return waiter

    def withdraw(self, waiter: Waiter) -> None:
        """Its client no longer waits: nothing of it stays here, and what was not taken is given back."""
        if waiter.open:
            for request in waiter.requests:
                self.policy.abort(request.rid)
            waiter.abandon_arrived(self.policy)
            self.pump()

    def settle(self, rank: int, cached: dict[str, int | None]) -> None:
        """Requests were answered."""
        now = self.now()
        found = {rid: tokens for rid, tokens in cached.items() if tokens is not None}
        self.policy.report(BatchReport(rank, tuple(cached), cached=found), now)
        self.pump(now)

    def abandon(self, rids: Sequence[str]) -> None:
        """Requests were sent and will not be answered."""
        for rid in rids:
            self.policy.abandon(rid)
        self.pump()

    def refuse(self, refusal: NoWorker | None) -> None:
        """From now on refuse everything, what waits included; None: serve again."""
        self.refusal = refusal
        if refusal is not None:
            for request in self.policy.abort(everything=True):
                request.payload.fail(refusal)

    def pump(self, now: float | None = None) -> None:
        """Send off what can go. Call after anything that may have made room."""
        if now is None:
            now = self.now()
        for dispatch in self.policy.poll(now):
            self._on_decision(dispatch)
            dispatch.request.payload.deliver(dispatch)
        self._arm(self.policy.next_wakeup(now))

    def _arm(self, at: float | None) -> None:
        if self._timer is not None:
            if at == self._timer_at:
                return
            self._timer.cancel()
            self._timer = None
        if at is not None:
            self._timer_at = at
            self._timer = asyncio.get_running_loop().call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self.pump()
