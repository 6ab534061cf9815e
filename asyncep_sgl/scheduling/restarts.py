"""Whether a rank that died is started again. Pure, time injected."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass
class RestartPolicy:
    """A rank that dies is restarted, unless it keeps dying: then something is wrong that a restart does not mend.

    Attributes:
        most: deaths of one rank within ``window`` that are forgiven.
        window: seconds.
    """

    most: int = 3
    window: float = 600.0
    _deaths: dict[int, deque[float]] = field(default_factory=dict)

    def died(self, rank: int, now: float) -> bool:
        """Notes a death at ``now`` (seconds); returns whether to restart."""
        deaths = self._deaths.setdefault(rank, deque())
        deaths.append(now)
        while deaths[0] < now - self.window:
            deaths.popleft()
        return len(deaths) <= self.most
