"""Whether what died is started again. Pure, time injected."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass
class RestartPolicy:
    """A process that dies is restarted, unless it keeps dying: then something is wrong that a restart does not mend.

    Attributes:
        most: deaths of one process within ``window`` that are forgiven.
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


@dataclass
class RankDeaths:
    """The same for ranks, whose deaths may be a request's doing or somebody's from outside.

    A rank is beyond help if it dies again and again without having computed anything since it was started: while it
    starts, or at the first pass. One that computes is worth having however often it goes, within reason. What a request
    is found guilty of counts for neither.

    Attributes:
        in_a_row: deaths of one rank without a pass between them that are forgiven.
        most: deaths of one rank within ``window`` that are forgiven, passes or not.
        window: seconds.
    """

    in_a_row: int = 3
    most: int = 30
    window: float = 600.0
    _deaths: dict[int, dict[int, float]] = field(default_factory=dict)
    _row: dict[int, int] = field(default_factory=dict)
    _computed: set[int] = field(default_factory=set)
    _number: int = 0

    def computed(self, rank: int) -> None:
        """A rank has computed a batch."""
        self._computed.add(rank)
        self._row.pop(rank, None)

    def died(self, rank: int, now: float) -> int:
        """Notes a death at ``now`` (seconds); returns a number for it."""
        self._number += 1
        deaths = self._deaths.setdefault(rank, {})
        deaths[self._number] = now
        for number in [number for number, at in deaths.items() if at < now - self.window]:
            del deaths[number]
        if rank in self._computed:
            self._computed.discard(rank)
        else:
            self._row[rank] = self._row.get(rank, 0) + 1
        return self._number

    def explained(self, death: int) -> None:
        """A request has been found guilty of a death: it no longer counts."""
        for rank, deaths in self._deaths.items():
            if deaths.pop(death, None) is not None:
                self._row.pop(rank, None)

    def verdict(self, rank: int) -> str | None:
        """Why a rank is not to be started again; None if it is."""
        row = self._row.get(rank, 0)
        if row > self.in_a_row:
            return f"rank {rank} died {row} times in a row without computing anything in between"
        if len(self._deaths.get(rank, ())) > self.most:
            return f"rank {rank} died more than {self.most} times in {self.window:.0f} s"
        return None
