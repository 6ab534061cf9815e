"""How long things took, counted in the process that does them.

Apart from `metrics.py`, because prometheus_client must not be imported in a process of SGLang's before SGLang has set
up its multiprocess mode.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

DECISION_SECONDS = (2.5e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 3e-3, 1e-2, 3e-2, 0.1)
"""Upper bounds of the buckets of `asyncep_router_decision_seconds`."""


class Durations:
    """A histogram that its process keeps itself, for another process to publish. Not thread-safe."""

    def __init__(self, bounds: Sequence[float] = DECISION_SECONDS) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """So many events took `seconds` each."""
        self._counts[bisect_left(self._bounds, seconds)] += times
        self._sum += seconds * times

    def snapshot(self) -> dict[str, Any]:
        """As plain data: `bounds` and `sum` in seconds; `cumulative` has one count more, all events."""
        return {"bounds": self._bounds, "cumulative": tuple(accumulate(self._counts)), "sum": self._sum}
