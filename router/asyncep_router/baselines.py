"""What other routers do, for comparison: a rank for every request on arrival.

`loads` is the number of requests sent to each rank and not yet finished: all that these policies look at.
`cache_aware` follows sglang_router's documented behaviour and defaults (threshold 0.3, absolute 64,
relative 1.5); it is written from the description, on token ids where the original matches text.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

from asyncep_router.block_view import BlockView
from asyncep_router.errors import ConfigError, DuplicateRequestError, UnknownRankError
from asyncep_router.messages import BatchReport, Dispatch, Reason, Request

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Sequence

    from asyncep_router.cost import ModelCost


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


class BaselinePolicy:
    """Another router's choice as a `Policy`: a rank at once for every request, nothing held back while any accepts.

    Baselines number ranks from 0 without gaps, so one is made anew when a request comes and the accepting ranks are not
    those it was made for; `cache_aware` then starts with an empty tree.

    `cost`: charges requests, for those who look; None charges nothing.
    """

    def __init__(self, make: Callable[[], Baseline], cost: ModelCost | None = None, ranks: int = 0) -> None:
        self._cost = cost
        self._make = make
        self._baseline: Baseline = make()
        self._made_for: list[int] = []
        self._ranks: list[int] = []  # accepting, ascending
        self._known: set[int] = set()
        self._trial: set[int] = set()
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._flying: dict[str, tuple[int, int, Request]] = {}  # rid -> rank, FLOPs, the request
        self._load: dict[int, int] = {}
        self._flops: dict[int, int] = {}
        self._dispatched = 0
        self._finished = 0
        self._cached = 0
        for rank in range(ranks):
            self.rank_joined(rank)

    @property
    def cost(self) -> ModelCost:
        """The model's. Raises `ConfigError` where there is none."""
        if self._cost is None:
            raise ConfigError("this policy was made without a cost model")
        return self._cost

    @cost.setter
    def cost(self, cost: ModelCost) -> None:
        self._cost = cost

    @property
    def pending(self) -> int:
        """Requests that wait for a rank to accept."""
        return len(self._waiting)

    def rank_joined(
        self,
        rank: int,
        *,
        caches: bool = True,
        cache_tokens: int | None = None,
        gathers: bool = False,
        threshold: float | None = None,
    ) -> None:
        """See `Policy`; all that it says of the rank's cache and T is ignored."""
        del caches, cache_tokens, gathers, threshold
        if rank < 0:
            raise UnknownRankError(f"rank {rank} is below 0")
        self._known.add(rank)
        self._load.setdefault(rank, 0)
        self._flops.setdefault(rank, 0)
        self.set_accepting(rank, True)

    def rank_died(self, rank: int) -> list[Request]:
        """See `Policy`."""
        self.set_accepting(rank, False)
        lost = [(rid, request) for rid, (where, _, request) in self._flying.items() if where == rank]
        for rid, request in lost:
            self.abandon(rid)
            self._waiting[rid] = request
        for rid, _ in reversed(lost):
            self._waiting.move_to_end(rid, last=False)
        return [request for _, request in lost]

    def set_accepting(self, rank: int, accepting: bool, *, trial: bool = False) -> None:
        """See `Policy`."""
        if rank not in self._known:
            raise UnknownRankError(f"rank {rank} never joined")
        (self._trial.add if trial and accepting else self._trial.discard)(rank)
        self._ranks = sorted({*self._ranks, rank} if accepting else {*self._ranks} - {rank})

    def cache_cleared(self, rank: int) -> None:
        """Their views have no such thing; wrong hints age out."""

    def submit(self, request: Request, now: float) -> None:
        """See `Policy`."""
        if request.rid in self._waiting or request.rid in self._flying:
            raise DuplicateRequestError(f"{request.rid!r} is pending or in flight already")
        if request.pinned is not None and request.pinned not in self._known:
            raise UnknownRankError(f"{request.rid!r} asks for rank {request.pinned}, which never joined")
        self._waiting[request.rid] = request

    def poll(self, now: float) -> list[Dispatch]:
        """See `Policy`."""
        out: list[Dispatch] = []
        for request in list(self._waiting.values()) if self._ranks else ():
            rank = request.pinned
            if rank is None:
                if self._made_for != self._ranks:
                    self._baseline, self._made_for = self._make(), list(self._ranks)
                rank = self._ranks[self._baseline.choose(request.token_ids, [self._load[r] for r in self._ranks])]
            if rank not in self._ranks or (rank in self._trial and self._load[rank]):
                continue
            del self._waiting[request.rid]
            flops = 0 if self._cost is None else max(1, self._cost.flops(len(request.token_ids), 0, request.logits))
            self._flying[request.rid] = (rank, flops, request)
            self._load[rank] += 1
            self._flops[rank] += flops
            self._dispatched += 1
            reason = Reason.FILL if request.pinned is None else Reason.PINNED
            out.append(Dispatch(request.rid, rank, reason, 0, flops, now - request.arrival, request))
        return out

    def next_wakeup(self, now: float) -> float | None:
        """Never: whatever happens is an event."""
        return None

    def report(self, report: BatchReport, now: float) -> None:
        """See `Policy`."""
        for rid in report.rids:
            if self.abandon(rid):
                self._finished += 1
        self._cached += sum(report.cached.values())

    def abandon(self, rid: str) -> bool:
        """See `Policy`."""
        where = self._flying.pop(rid, None)
        if where is None:
            return False
        rank, flops, _ = where
        self._load[rank] -= 1
        self._flops[rank] -= flops
        return True

    def abort(self, rid: str = "", *, prefix: bool = False, everything: bool = False) -> list[Request]:
        """See `Policy`."""
        if not prefix and not everything:
            one = self._waiting.pop(rid, None)
            return [] if one is None else [one]
        gone = [name for name in self._waiting if everything or name.startswith(rid)]
        return [self._waiting.pop(name) for name in gone]

    def outstanding(self, rank: int) -> int:
        """FLOPs a rank has in flight, by whole prompts."""
        return self._flops[rank]

    def threshold(self, rank: int) -> float:
        """Nothing is held back."""
        del rank
        return 0.0

    def snapshot(self) -> dict[str, Any]:
        """See `Policy`."""
        return {
            "pending": self.pending,
            "dispatched": self._dispatched,
            "finished": self._finished,
            "cached_tokens": self._cached,
            "ranks": {
                rank: {
                    "accepting": rank in self._ranks,
                    "outstanding_flops": self._flops[rank],
                    "requests_in_flight": self._load[rank],
                }
                for rank in sorted(self._known)
            },
        }
