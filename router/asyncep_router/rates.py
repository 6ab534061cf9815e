"""Prompts a second of each key that has a limit: a bucket that fills with time. Not thread-safe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncep_router.keys import Caller

_BURST_SECONDS = 10.0
# Absorbs rounding: who comes when told to must not miss by 1e-16.
_SLACK = 1e-9


class Rates:
    """A bucket for each caller with a rate; it holds what ten seconds fill, and at least one prompt.

    Args:
        now: seconds, of a clock that never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, caller: Caller, prompts: int) -> float:
        """Counts a request's prompts; the seconds after which it may come again, 0 if it may go now.

        A request with more prompts than the bucket holds goes when the bucket is full and leaves it in debt.
        """
        if caller.prompts_per_second is None:
            return 0.0
        most, level = self._level(caller, caller.prompts_per_second)
        needed = min(float(prompts), most)
        enough = level >= needed - _SLACK
        if enough:
            self.charge(caller, prompts)
        return 0.0 if enough else (needed - level) / caller.prompts_per_second

    def charge(self, caller: Caller, prompts: int) -> None:
        """Counts prompts that are served anyhow; the bucket may be in debt afterwards."""
        if caller.prompts_per_second is not None:
            _, level = self._level(caller, caller.prompts_per_second)
            self._buckets[caller.name] = (level - prompts, self._now())

    def debt_seconds(self, caller: Caller) -> float:
        """Seconds until the caller's bucket is out of debt; 0 where it is in none."""
        if caller.prompts_per_second is None:
            return 0.0
        _, level = self._level(caller, caller.prompts_per_second)
        return max(0.0, -level / caller.prompts_per_second)

    def _level(self, caller: Caller, rate: float) -> tuple[float, float]:
        """What a caller's bucket holds when full, and what is in it."""
        now, most = self._now(), max(1.0, rate * _BURST_SECONDS)
        level, at = self._buckets.get(caller.name, (most, now))
        return most, min(most, level + (now - at) * rate)
