"""A circuit breaker: after too many failures in a row a worker is left alone for a while. Pure, time injected."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum


class BreakerState(StrEnum):
    """`half_open`: one request at a time is let through to see whether the worker recovered."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True)
class BreakerSettings:
    """`failures` in a row within `window` seconds open it for `timeout` seconds; then `successes` close it."""

    failures: int = 10
    successes: int = 3
    timeout: float = 60
    window: float = 120
    enabled: bool = True


class Breaker:
    """One worker's breaker. Times are seconds on the caller's clock and never run backwards."""

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._failures: deque[float] = deque()
        self._successes = 0
        self._opened = 0.0
        self.state = BreakerState.CLOSED
        self.transitions: dict[tuple[BreakerState, BreakerState], int] = {}

    @property
    def consecutive_failures(self) -> int:
        """Failures since the last success, those older than the window left out at the next failure."""
        return len(self._failures)

    def advance(self, now: float) -> BreakerState:
        """The state at this time: an open breaker becomes half-open by itself."""
        if self.state is BreakerState.OPEN and now >= self._opened + self._settings.timeout:
            self._successes = 0
            self._move(BreakerState.HALF_OPEN)
        return self.state

    def next_change(self) -> float | None:
        """When `advance` will change the state; None if only an outcome can."""
        return self._opened + self._settings.timeout if self.state is BreakerState.OPEN else None

    def record(self, success: bool, now: float) -> BreakerState:
        """A request to the worker ended. Outcomes of requests sent before it opened change nothing while open."""
        if not self._settings.enabled or self.advance(now) is BreakerState.OPEN:
            return self.state
        if success:
            self._failures.clear()
            self._successes += 1
            if self.state is BreakerState.HALF_OPEN and self._successes >= self._settings.successes:
                self._move(BreakerState.CLOSED)
            return self.state
        self._failures.append(now)
        while self._failures[0] < now - self._settings.window:
            self._failures.popleft()
        if self.state is BreakerState.HALF_OPEN or len(self._failures) >= self._settings.failures:
            self._opened = now
            self._move(BreakerState.OPEN)
        return self.state

    def _move(self, state: BreakerState) -> None:
        step = (self.state, state)
        self.transitions[step] = self.transitions.get(step, 0) + 1
        self.state = state
        if state is not BreakerState.HALF_OPEN:
            self._failures.clear()
