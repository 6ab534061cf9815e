"""Which requests are suspected of a rank's death, and what becomes of them. Pure, time injected.

A request that was in the batch that a rank computed when it died is a *suspect*; where the rank computed none, all that
it had are. A suspect is not sent with others any more: it gets a *trial*, alone on a rank that takes nothing else
meanwhile. If that rank dies too, the request is condemned; otherwise it has its answer like any other. One trial runs
at a time, so that a request costs at most one rank more than the first.

The rest of what a dead rank had is innocent and goes elsewhere at once; but whoever was there at two deaths is a
suspect from then on, whatever was computed.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Death(NamedTuple):
    """What a rank's death says about the requests that it had.

    Attributes:
        suspects: are to be set aside for a trial.
        condemned: was alone on the rank; None if the rank was no trial's.
    """

    suspects: list[str]
    condemned: str | None


class Step(NamedTuple):
    """What is to be done now.

    Attributes:
        reserved: the rank that is to take no requests but suspects; None if every rank takes any.
        trial: the suspect to be sent to it now, if any.
    """

    reserved: int | None
    trial: str | None


@dataclass
class Quarantine:
    """Suspects and trials.

    Attributes:
        patience: seconds that suspects wait for a rank that has nothing to do. Then the one with the least is emptied.
        turn: seconds after which trials let others have the only rank there is, for as long.
    """

    patience: float = 5.0
    turn: float = 1.0
    _suspects: dict[str, int | None] = field(default_factory=dict)
    _present: set[str] = field(default_factory=set)
    _of_death: dict[str, int] = field(default_factory=dict)
    _trial: tuple[str, int] | None = None
    _pinned_trial: int | None = None
    _reserved: int | None = None
    _since: float = 0.0
    _turn_until: float = 0.0
    _others_until: float = 0.0

    @property
    def waiting(self) -> int:
        """Suspects that have not had their trial."""
        return len(self._suspects)

    @property
    def trial(self) -> tuple[str, int] | None:
        """The suspect that is tried now, and on which rank."""
        return self._trial

    @property
    def tracked(self) -> int:
        """Requests that something is kept about."""
        return len(self._suspects.keys() | self._present | self._of_death.keys())

    def rank_died(
        self,
        rank: int,
        had: Sequence[str],
        computing: Collection[str],
        pinned: Mapping[str, int],
        death: int,
        now: float,
    ) -> Death:
        """A rank has died.

        Args:
            rank: which.
            had: requests it was sent and has not finished, in order.
            computing: requests of the batches that it had begun and not finished.
            pinned: for those of ``had`` that may go to one rank only, which.
            death: a number for it, given back by `condemn`.
            now: seconds.
        """
        if self._reserved == rank:
            self._reserved = None
        if self._trial is not None and self._trial[1] == rank:
            rid, self._trial = self._trial[0], None
            if rid in had:
                return Death([], rid)
        begun = [rid for rid in had if rid in computing]
        suspects = [rid for rid in had if not begun or rid in computing or rid in self._present]
        if suspects and not self._suspects:
            self._since = now
        for rid in suspects:
            self._suspects[rid] = pinned.get(rid)
            self._of_death[rid] = death
            self._present.discard(rid)
        self._present.update(rid for rid in had if rid not in self._suspects)
        return Death(suspects, None)

    def rank_was_stopped(self, rank: int) -> str | None:
        """A rank was ended because somebody had stopped it: no request is why. Returns the suspect tried there, if any.

        It is to be set aside again.
        """
        if self._reserved == rank:
            self._reserved = None
        if self._trial is None or self._trial[1] != rank:
            return None
        (rid, _), self._trial = self._trial, None
        self._suspects[rid] = self._pinned_trial
        return rid

    def condemn(self, rid: str) -> int | None:
        """A request is answered as deadly; returns the earlier death that it explains."""
        self._present.discard(rid)
        self._suspects.pop(rid, None)
        return self._of_death.pop(rid, None)

    def forget(self, rid: str) -> None:
        """A request is finished, or nobody waits for it any more."""
        self._suspects.pop(rid, None)
        self._present.discard(rid)
        self._of_death.pop(rid, None)
        if self._trial is not None and self._trial[0] == rid:
            self._trial = None

    def step(self, loads: Mapping[int, int], others_wait: bool, now: float) -> Step:
        """What to do now.

        Args:
            loads: requests on each rank that lives.
            others_wait: requests that are no suspects wait for a rank.
            now: seconds.
        """
        if self._trial is not None:
            return Step(self._reserved, None)
        if self._reserved not in loads:
            self._reserved = None
        if not self._suspects:
            self._reserved = None
            return Step(None, None)
        if others_wait and len(loads) == 1:
            if now < self._others_until:
                return Step(None, None)
            if self._reserved is not None and now >= self._turn_until:
                self._reserved, self._others_until = None, now + self.turn
                return Step(None, None)
        if self._reserved is None:
            self._reserved = self._choice(loads, now)
            if self._reserved is None:
                return Step(None, None)
            self._turn_until = now + self.turn
        rid = self._next_for(self._reserved)
        if rid is None:
            # What is left may go to other ranks only.
            self._reserved = None
            return Step(None, None)
        if loads[self._reserved]:
            return Step(self._reserved, None)
        self._pinned_trial = self._suspects.pop(rid)
        self._trial = (rid, self._reserved)
        return Step(self._reserved, rid)

    def next_wakeup(self, now: float) -> float | None:
        """When `step` could have something to say without any event before."""
        if self._trial is not None or not self._suspects:
            return None
        times = (self._since + self.patience, self._others_until, self._turn_until)
        return min((time for time in times if time > now), default=None)

    def _next_for(self, rank: int) -> str | None:
        return next((rid for rid, pinned in self._suspects.items() if pinned in (None, rank)), None)

    def _choice(self, loads: Mapping[int, int], now: float) -> int | None:
        wanted = {pinned for pinned in self._suspects.values() if pinned is not None}
        fit = [rank for rank in loads if rank in wanted or None in self._suspects.values()]
        idle = [rank for rank in fit if not loads[rank]]
        if idle:
            return idle[0]
        if fit and now >= self._since + self.patience:
            return min(fit, key=lambda rank: loads[rank])
        return None


@dataclass
class Remembered:
    """Fingerprints of condemned requests, so that one that is sent again costs no rank. Bounded.

    Attributes:
        seconds: how long each is kept after it was last seen.
        most: how many at most; the one longest not seen makes room.
    """

    seconds: float = 3600.0
    most: int = 1024
    _seen: collections.OrderedDict[bytes, float] = field(default_factory=collections.OrderedDict)

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, fingerprint: bytes, now: float) -> None:
        """Keeps one."""
        self._seen.pop(fingerprint, None)
        self._seen[fingerprint] = now
        while len(self._seen) > self.most:
            self._seen.popitem(last=False)

    def knows(self, fingerprint: bytes, now: float) -> bool:
        """Whether a request with this fingerprint was condemned lately."""
        self.expire(now)
        if fingerprint not in self._seen:
            return False
        self.add(fingerprint, now)
        return True

    def expire(self, now: float) -> None:
        """Drops what is too old."""
        while self._seen and next(iter(self._seen.values())) <= now - self.seconds:
            self._seen.popitem(last=False)
