"""How many requests the router works on at once, how many wait for that, and how many a second. Pure.

Ids in, verdicts out, first come first served. `ask`, then `poll` after every event and at `next_wakeup`.
"""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum
from typing import NamedTuple

from asyncep_router.errors import IntegrityError


class Verdict(Enum):
    """What becomes of a request that asks."""

    ADMITTED = "admitted"
    QUEUED = "queued"
    FULL = "full"


class Polled(NamedTuple):
    """Ids that waited: those admitted now, and those whose time is up."""

    admitted: list[int]
    expired: list[int]


class Admission:
    """`limit`: requests at once, None for any number. `queue`: how many may wait. `patience`: seconds they do.

    `rate`: requests a second, None for any; `limit` of them (or a second's worth) may come in a burst.
    """

    def __init__(self, limit: int | None, queue: int, patience: float, rate: float | None = None) -> None:
        self._limit = limit
        self._queue_size = queue
        self._patience = patience
        self._rate = rate
        self._burst = float(limit if limit is not None else max(rate or 1, 1))
        self._tokens = self._burst
        self._filled_at: float | None = None
        self._active: set[int] = set()
        self._queue: OrderedDict[int, float] = OrderedDict()  # id -> when its time is up

    @property
    def active(self) -> int:
        """Requests being worked on."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def ask(self, ident: int, now: float) -> Verdict:
        """A request arrives. It must not be known yet."""
        if ident in self._active or ident in self._queue:
            raise IntegrityError(f"request {ident} asks twice")
        if not self._queue and self._take(ident, now):
            return Verdict.ADMITTED
        if len(self._queue) >= self._queue_size:
            return Verdict.FULL
        self._queue[ident] = now + self._patience
        return Verdict.QUEUED

    def poll(self, now: float) -> Polled:
        """Whoever waited and may go, or waited too long."""
        polled = Polled([], [])
        while self._queue:
            ident, until = next(iter(self._queue.items()))
            if until <= now:
                polled.expired.append(ident)
            elif self._take(ident, now):
                polled.admitted.append(ident)
            else:
                break
            del self._queue[ident]
        return polled

    def leave(self, ident: int) -> None:
        """A request is answered, or its client gave up, wherever it was."""
        self._active.discard(ident)
        self._queue.pop(ident, None)

    def next_wakeup(self, now: float) -> float | None:
        """When `poll` could have something to say without any event before."""
        if not self._queue:
            return None
        until = next(iter(self._queue.values()))
        room = self._limit is None or len(self._active) < self._limit
        if room and self._rate is not None:
            self._refill(now)
            return min(until, now + max(0.0, 1 - self._tokens) / self._rate)
        return until

    def _take(self, ident: int, now: float) -> bool:
        if self._limit is not None and len(self._active) >= self._limit:
            return False
        if self._rate is not None:
            self._refill(now)
            # The slack absorbs rounding: waking exactly when the token is due must not miss it by 1e-16.
            if self._tokens < 1 - 1e-9:
                return False
            self._tokens = max(0.0, self._tokens - 1)
        self._active.add(ident)
        return True

    def _refill(self, now: float) -> None:
        if self._filled_at is not None and self._rate is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
