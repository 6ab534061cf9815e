"""What other routers do, for comparison in the simulator: a rank for every request on arrival.

`loads` is the number of requests sent to each rank and not yet finished: all that these policies look at.
`cache_aware` follows sglang_router's documented behaviour and defaults (threshold 0.3, absolute 64,
relative 1.5); it is written from the description, on token ids where the original matches text.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Protocol

from asyncep_router.block_view import BlockView
from asyncep_router.messages import BatchReport, Dispatch, Reason, Request

if TYPE_CHECKING:
    from array import array
    from collections.abc import Sequence


class Baseline(Protocol):
    """Chooses a rank as soon as a request arrives."""

    def choose(self, token_ids: array[int], loads: Sequence[int]) -> int:
        """A rank below `len(loads)`."""


class RoundRobin:
    """One after another; SGLang's default between data-parallel ranks."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, token_ids: array[int], loads: Sequence[int]) -> int:
        self._next += 1
        return (self._next - 1) % len(loads)


class Random:
    """Any rank."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def choose(self, token_ids: array[int], loads: Sequence[int]) -> int:
        return self._rng.randrange(len(loads))


class PowerOfTwo:
    """The less loaded of two ranks drawn at random."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def choose(self, token_ids: array[int], loads: Sequence[int]) -> int:
        if len(loads) == 1:
            return 0
        return min(self._rng.sample(range(len(loads)), 2), key=loads.__getitem__)


class ShortestQueue:
    """The rank with the fewest requests; SGLang's `total_requests`."""

    def choose(self, token_ids: array[int], loads: Sequence[int]) -> int:
        return min(range(len(loads)), key=loads.__getitem__)


class CacheAware:
    """Longest match if it is long enough and loads are balanced; else the smallest tree or queue."""

    def __init__(self, threshold: float = 0.3, absolute: int = 64, relative: float = 1.5, block: int = 32) -> None:
        self._threshold = threshold
        self._absolute = absolute
        self._relative = relative
        self._view = BlockView(1 << 30, block)

    def choose(self, token_ids: array[int], loads: Sequence[int]) -> int:
        low, high = min(loads), max(loads)
        if high - low > self._absolute and high > low * self._relative:
            rank = loads.index(low)
        else:
            match = self._view.match(token_ids).by_rank()
            best = max(match, key=match.__getitem__, default=0)
            if match.get(best, 0) > self._threshold * len(token_ids):
                rank = best
            else:
                rank = min(range(len(loads)), key=self._view.tokens_of)
        self._view.insert(rank, token_ids)
        return rank


class Immediate:
    """Gives a baseline the frontend's shape: submit, poll, report. Charges nothing and holds nothing back."""

    def __init__(self, baseline: Baseline, ranks: int) -> None:
        self._baseline = baseline
        self._loads = [0] * ranks
        self._out: list[Dispatch] = []

    def submit(self, request: Request, now: float) -> None:
        rank = self._baseline.choose(request.token_ids, self._loads)
        self._loads[rank] += 1
        waited = now - request.arrival
        self._out.append(Dispatch(request.rid, rank, Reason.FILL, 0, 0, waited, request))

    def poll(self, now: float) -> list[Dispatch]:
        out, self._out = self._out, []
        return out

    def report(self, report: BatchReport, now: float) -> None:
        self._loads[report.rank] -= len(report.rids)

    def next_wakeup(self, now: float) -> float | None:
        return None
