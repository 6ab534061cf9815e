"""Whether ranks that run do anything. Pure, time injected.

A rank's process beats once a second. One that is silent is stopped or stuck, and its requests would wait for ever. Time
counts only while the router itself is awake: a machine that was suspended, or a router that was stopped, finds all
ranks silent for as long, and none of them at fault.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class _Rank:
    beats: bool
    heard: float
    moved: float


@dataclass
class Vigil:
    """What is known about each rank's signs of life, in seconds of the router's own awake time.

    Attributes:
        silence: seconds without a beat after which a rank is stuck.
        before_beats: the same for a process that has not beaten yet, since it is only starting.
        patience: seconds without a batch done that are allowed to a rank that has work, whatever its work.
        factor: how many times what its work should take is allowed, if that is more.
        unknown: seconds allowed where nobody knows what it should take.
        step: the most that may pass between two looks and count.
    """

    silence: float = 10.0
    before_beats: float = 300.0
    patience: float = 60.0
    factor: float = 20.0
    unknown: float = 600.0
    step: float = 2.0
    awake: float = 0.0
    _last: float | None = None
    _ranks: dict[int, _Rank] = field(default_factory=dict)

    def look(self, now: float) -> None:
        """The router is awake at ``now``."""
        if self._last is not None:
            self.awake += min(self.step, max(0.0, now - self._last))
        self._last = now

    def started(self, rank: int) -> None:
        """A rank's process runs."""
        self._ranks[rank] = _Rank(False, self.awake, self.awake)

    def ended(self, rank: int) -> None:
        """A rank's process has ended."""
        self._ranks.pop(rank, None)

    def beat(self, rank: int) -> None:
        """A rank's process has given a sign of life."""
        if (known := self._ranks.get(rank)) is not None:
            known.beats, known.heard = True, self.awake

    def moved(self, rank: int) -> None:
        """A rank has done a batch, or has been given work when it had none."""
        if (known := self._ranks.get(rank)) is not None:
            known.moved = self.awake

    def silent_for(self, rank: int) -> float:
        """Seconds since a rank was heard."""
        known = self._ranks.get(rank)
        return 0.0 if known is None else self.awake - known.heard

    def limit(self, rank: int) -> float:
        """Seconds of silence from which on a rank is stuck."""
        known = self._ranks.get(rank)
        return self.silence if known is not None and known.beats else self.before_beats

    def __contains__(self, rank: int) -> bool:
        return rank in self._ranks

    def stalled(self, rank: int, expected: float | None) -> bool:
        """Whether a rank that has work has not moved for far longer than it should take.

        Args:
            rank: which.
            expected: seconds its work should take; None if nobody knows.
        """
        known = self._ranks.get(rank)
        if known is None:
            return False
        allowed = self.unknown if expected is None else max(self.patience, self.factor * expected)
        return self.awake - known.moved > allowed
