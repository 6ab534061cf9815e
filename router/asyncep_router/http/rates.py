"""Prompts a second of each key that has a limit: a bucket that fills with time. Pure, time injected."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncep_router.keys import Caller

_BURST_SECONDS = 10.0


class Rates:
    """A bucket for each caller with a rate; it holds what ten seconds fill, and at least one prompt."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, caller: Caller, prompts: int) -> float:
        """Count a request's prompts; the seconds after which it may come again, 0 if it may go now.

        A request with more prompts than the bucket holds goes when the bucket is full and leaves it in debt.
        """
        rate = caller.prompts_per_second
        if rate is None:
            return 0.0
        now = self._now()
        most = max(1.0, rate * _BURST_SECONDS)
        level, at = self._buckets.get(caller.name, (most, now))
        level = min(most, level + (now - at) * rate)
        needed = min(float(prompts), most)
        # The slack absorbs rounding: who comes when told to must not miss by 1e-16.
        enough = level >= needed - 1e-9
        self._buckets[caller.name] = (level - prompts if enough else level, now)
        return 0.0 if enough else (needed - level) / rate
