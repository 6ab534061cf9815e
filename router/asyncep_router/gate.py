"""The saturation gate: which ranks may take work, as sets of ranks.

T is the FLOPs of a batch from which the gather of the next layer's experts hides behind the compute of
this one (T = t_EP F gamma). A rank is *saturated* at or above T of outstanding FLOPs, and
*open* while it has less than `inflight_target` batches: the one it computes and the one it takes next.
More would only bind requests to a rank earlier than need be. A batch is T, but not less than what computes
well: where nothing is gathered T is small, so that work is spread at once, and batches are not. Requests have a limit
too: a thousand of three tokens are few FLOPs and, each for its own handling, much time.

Where ranks let quick requests pass bulk (`fairness.py`), a rank that is full of bulk is still *express*: it takes quick
ones up to the same limits, as if there were no bulk on it.
"""

from __future__ import annotations

import itertools
import math

from asyncep_router.errors import ConfigError, IntegrityError, UnknownRankError

# On trial a rank counts as full from this many FLOPs on: one request at a time.
_TRIAL_FLOPS = 1.0


class Gate:
    """Sets of ranks by how full they are; `note` keeps them up to date.

    `alive` may take work; `idle` have none; `unsaturated` are below T; `open` below the limit; `express` below the
    limit with their quick requests alone. Each is a subset of the next: idle ⊆ unsaturated ⊆ open ⊆ express ⊆ alive.
    """

    def __init__(self, inflight_target: float, least_batch: float = 0.0, most_requests: float = math.inf) -> None:
        if inflight_target < 1:
            raise ConfigError(f"inflight_target={inflight_target!r}: below 1 no rank could ever saturate")
        self._target = inflight_target
        self._least_batch = least_batch
        self._most_requests = most_requests
        self._threshold: dict[int, float] = {}
        self._trial = 0
        self._outstanding: dict[int, int] = {}
        self._quick: dict[int, int] = {}
        self._crowded = 0
        self._crowded_by_quick = 0
        self.alive = 0
        self.idle = 0
        self.unsaturated = 0
        self.open = 0
        self.express = 0
        self.capacity = 0.0
        """FLOPs of a batch on each rank that may take work; where none may, on each that ever did."""
        self.least_weight = 0.0
        """FLOPs that a request weighs at least: as if a rank's limits of requests and of FLOPs were one."""

    def join(self, rank: int, threshold: float) -> None:
        """A rank starts to take work; `threshold` is T in FLOPs of a whole pass."""
        self._outstanding.setdefault(rank, 0)
        self.alive |= 1 << rank
        self.set_threshold(rank, threshold)

    def leave(self, rank: int) -> None:
        """It takes no more work; `join` lets it again."""
        self.alive &= ~(1 << rank)
        self._sort(rank)
        self._add_up()

    def set_threshold(self, rank: int, threshold: float) -> None:
        """T of a rank, FLOPs of a whole pass."""
        if not threshold > 0:
            raise ConfigError(f"threshold of rank {rank}={threshold!r}: must be above 0")
        self._threshold[rank] = threshold
        self._sort(rank)
        self._add_up()

    def set_trial(self, rank: int, trial: bool) -> None:
        """A rank that is on trial takes one request at a time."""
        self._trial = self._trial & ~(1 << rank) | (trial << rank)
        self._sort(rank)
        self._add_up()

    def threshold(self, rank: int) -> float:
        """T of a rank, FLOPs of a whole pass. Raises `UnknownRankError`."""
        try:
            return self._threshold[rank]
        except KeyError:
            raise UnknownRankError(f"rank {rank} never joined") from None

    def batch(self, rank: int) -> float:
        """FLOPs of a batch of a rank that has enough to do. Raises `UnknownRankError`."""
        threshold = self.threshold(rank)
        return _TRIAL_FLOPS if self._trial >> rank & 1 else max(threshold, self._least_batch)

    def limit(self, rank: int) -> float:
        """FLOPs from which on a rank is given no more. Raises `UnknownRankError`."""
        return self.batch(rank) if self._trial >> rank & 1 else self.batch(rank) * self._target

    def note(self, rank: int, outstanding: int, requests: int, quick: int, quick_requests: int) -> None:
        """The rank's outstanding FLOPs and requests changed; `quick` and `quick_requests` are those that pass bulk."""
        others = ~(1 << rank)
        self._outstanding[rank] = outstanding
        self._quick[rank] = quick
        self._crowded = self._crowded & others | ((requests >= self._most_requests) << rank)
        self._crowded_by_quick = self._crowded_by_quick & others | ((quick_requests >= self._most_requests) << rank)
        self._sort(rank)

    def fill(self, rank: int) -> float:
        """Outstanding FLOPs over T."""
        return self._outstanding[rank] / self._threshold[rank]

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless the sets nest."""
        nested = (self.idle, self.unsaturated, self.open, self.express, self.alive)
        if any(inner & ~outer for inner, outer in itertools.pairwise(nested)):
            raise IntegrityError(
                f"idle {self.idle:b}, below T {self.unsaturated:b}, open {self.open:b}, express {self.express:b}, "
                f"alive {self.alive:b}"
            )

    def _add_up(self) -> None:
        ranks = [rank for rank in self._threshold if self.alive >> rank & 1] or list(self._threshold)
        self.capacity = sum(self.batch(rank) for rank in ranks)
        self.least_weight = self.capacity / len(ranks) * self._target / self._most_requests

    def _sort(self, rank: int) -> None:
        bit = 1 << rank
        others = ~bit
        here = self.alive & bit
        load = self._outstanding.get(rank, 0)
        threshold = min(self._threshold[rank], self.batch(rank))
        room = here & ~self._crowded
        self.idle = self.idle & others | (here if load <= 0 else 0)
        self.unsaturated = self.unsaturated & others | (room if load < threshold else 0)
        self.open = self.open & others | (room if load < self.limit(rank) else 0)
        quick = self._quick.get(rank, 0) < self.limit(rank)
        self.express = self.express & others | (here & ~self._crowded_by_quick if quick else 0)
