"""Which rank a request goes to: the frontend's policy or a baseline, behind one interface. No I/O.

Ranks are small integers, one for every data-parallel rank behind every URL (`fleet.py` knows which).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

from asyncep_router.baselines import Baseline, CacheAware, PowerOfTwo, Random, RoundRobin
from asyncep_router.block_view import BlockView
from asyncep_router.errors import UnknownRankError
from asyncep_router.messages import BatchReport, Dispatch, Reason, Request
from asyncep_router.policy import Frontend

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncep_router.cost import ModelCost
    from asyncep_router.http.options import RouterOptions
    from asyncep_router.prefix import PrefixView

# On trial (a half-open circuit) a rank counts as full from this many FLOPs on: one request at a time.
_TRIAL_FLOPS = 1.0


class Placement(Protocol):
    """Decides; holds what no rank has room for. Every request submitted is dispatched by a later `poll`,
    or withdrawn; every dispatch is settled or abandoned."""

    cost: ModelCost

    @property
    def pending(self) -> int:
        """Requests that wait here."""

    def join(self, rank: int, threshold: float, cache_tokens: int | None, caches: bool, gathers: bool) -> None:
        """A rank is there, not accepting yet. `threshold`: FLOPs of a pass that saturate it; if it `gathers` weights,
        less takes as long."""

    def accept(self, rank: int, accepting: bool, trial: bool = False) -> None:
        """Let it take work or not; on `trial` one request at a time."""

    def leave(self, rank: int) -> None:
        """It is gone, with nothing in flight; its number may be used again."""

    def forget_cache(self, rank: int) -> None:
        """Its cache is empty now."""

    def submit(self, request: Request, now: float) -> None:
        """A request arrives."""

    def poll(self, now: float) -> list[Dispatch]:
        """What is to be sent now, charged already."""

    def next_wakeup(self, now: float) -> float | None:
        """When `poll` could have something to say without any event before."""

    def settle(self, rank: int, cached: dict[str, int | None], now: float) -> None:
        """Requests are answered; with the tokens they found in the cache, where known."""

    def abandon(self, rid: str) -> None:
        """A dispatched request will not be answered."""

    def withdraw(self, rid: str) -> None:
        """A waiting request is no longer wanted."""

    def withdraw_all(self) -> list[Request]:
        """Nothing waits any longer."""

    def outstanding(self, rank: int) -> int:
        """FLOPs in flight."""

    def threshold(self, rank: int) -> float:
        """FLOPs that saturate it, 0 if the policy does not care."""

    def snapshot(self) -> dict[str, Any]:
        """The state as plain data."""


def make_placement(options: RouterOptions, cost: ModelCost) -> Placement:
    """What `--policy` names."""
    if options.policy == "asyncep":
        return FrontendPlacement(Frontend(cost, _view(options), options.limits))
    if options.policy == "cache_aware":
        return BaselinePlacement(
            cost,
            lambda: CacheAware(
                options.cache_threshold, options.balance_abs_threshold, options.balance_rel_threshold, block=32
            ),
        )
    if options.policy == "power_of_two":
        return BaselinePlacement(cost, lambda: PowerOfTwo(random.getrandbits(32)))
    if options.policy == "random":
        return BaselinePlacement(cost, lambda: Random(random.getrandbits(32)))
    return BaselinePlacement(cost, RoundRobin)


def _view(options: RouterOptions) -> PrefixView:
    if options.prefix_view == "radix":
        # Imports SGLang: seconds and a gigabyte that only this choice pays.
        from asyncep_router.radix import SharedRadixTree

        tree: PrefixView = SharedRadixTree(options.max_tree_size)
        return tree
    return BlockView(max(options.max_tree_size, options.prefix_block_tokens), options.prefix_block_tokens)


class FrontendPlacement:
    """The project's policy."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self._thresholds: dict[int, float] = {}

    @property
    def cost(self) -> ModelCost:
        return self.frontend.cost

    @cost.setter
    def cost(self, cost: ModelCost) -> None:
        self.frontend.cost = cost

    @property
    def pending(self) -> int:
        return self.frontend.pending

    def join(self, rank: int, threshold: float, cache_tokens: int | None, caches: bool, gathers: bool) -> None:
        self._thresholds[rank] = threshold
        self.frontend.rank_joined(rank, caches=caches, cache_tokens=cache_tokens, gathers=gathers)
        self.frontend.gate.set_threshold(rank, threshold)
        self.frontend.set_accepting(rank, False)

    def accept(self, rank: int, accepting: bool, trial: bool = False) -> None:
        self.frontend.gate.set_threshold(rank, _TRIAL_FLOPS if trial else self._thresholds[rank])
        self.frontend.set_accepting(rank, accepting)

    def leave(self, rank: int) -> None:
        self.frontend.rank_died(rank)

    def forget_cache(self, rank: int) -> None:
        self.frontend.cache_cleared(rank)

    def submit(self, request: Request, now: float) -> None:
        self.frontend.submit(request, now)

    def poll(self, now: float) -> list[Dispatch]:
        return self.frontend.poll(now)

    def next_wakeup(self, now: float) -> float | None:
        return self.frontend.next_wakeup(now)

    def settle(self, rank: int, cached: dict[str, int | None], now: float) -> None:
        found = {rid: tokens for rid, tokens in cached.items() if tokens is not None}
        self.frontend.report(BatchReport(rank, tuple(cached), cached=found), now)

    def abandon(self, rid: str) -> None:
        self.frontend.abandon(rid)

    def withdraw(self, rid: str) -> None:
        self.frontend.abort(rid)

    def withdraw_all(self) -> list[Request]:
        return self.frontend.abort(everything=True)

    def outstanding(self, rank: int) -> int:
        return self.frontend.ledger.account(rank).outstanding

    def threshold(self, rank: int) -> float:
        return self._thresholds[rank]

    def snapshot(self) -> dict[str, Any]:
        return self.frontend.snapshot()


class BaselinePlacement:
    """Another router's policy: a rank at once for every request, nothing held back while any rank accepts.

    The policies number ranks from 0 without gaps, so one is made anew whenever the accepting ranks change;
    `cache_aware` then starts with an empty tree.
    """

    def __init__(self, cost: ModelCost, make: Callable[[], Baseline]) -> None:
        self.cost = cost
        self._make = make
        self._baseline: Baseline = make()
        self._ranks: list[int] = []  # accepting, ascending
        self._known: set[int] = set()
        self._trial: set[int] = set()
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._flying: dict[str, tuple[int, int]] = {}  # rid -> rank, FLOPs
        self._load: dict[int, int] = {}
        self._flops: dict[int, int] = {}
        self._dispatched = 0
        self._finished = 0
        self._cached = 0

    @property
    def pending(self) -> int:
        return len(self._waiting)

    def join(self, rank: int, threshold: float, cache_tokens: int | None, caches: bool, gathers: bool) -> None:
        self._known.add(rank)
        self._load.setdefault(rank, 0)
        self._flops.setdefault(rank, 0)

    def accept(self, rank: int, accepting: bool, trial: bool = False) -> None:
        if rank not in self._known:
            raise UnknownRankError(f"rank {rank} never joined")
        (self._trial.add if trial and accepting else self._trial.discard)(rank)
        ranks = sorted({*self._ranks, rank} if accepting else {*self._ranks} - {rank})
        if ranks != self._ranks:
            self._ranks = ranks
            self._baseline = self._make()

    def leave(self, rank: int) -> None:
        self.accept(rank, False)
        self._known.discard(rank)

    def forget_cache(self, rank: int) -> None:
        """Their views have no such thing; wrong hints age out."""

    def submit(self, request: Request, now: float) -> None:
        if request.pinned is not None and request.pinned not in self._known:
            raise UnknownRankError(f"{request.rid!r} asks for rank {request.pinned}, which never joined")
        self._waiting[request.rid] = request

    def poll(self, now: float) -> list[Dispatch]:
        out: list[Dispatch] = []
        for request in list(self._waiting.values()) if self._ranks else ():
            rank = request.pinned
            if rank is None:
                rank = self._ranks[self._baseline.choose(request.token_ids, [self._load[r] for r in self._ranks])]
            if rank not in self._ranks or (rank in self._trial and self._load[rank]):
                continue
            del self._waiting[request.rid]
            flops = max(1, self.cost.flops(len(request.token_ids), 0, request.logits))
            self._flying[request.rid] = (rank, flops)
            self._load[rank] += 1
            self._flops[rank] += flops
            self._dispatched += 1
            reason = Reason.FILL if request.pinned is None else Reason.PINNED
            out.append(Dispatch(request.rid, rank, reason, 0, flops, now - request.arrival, request))
        return out

    def next_wakeup(self, now: float) -> float | None:
        return None

    def settle(self, rank: int, cached: dict[str, int | None], now: float) -> None:
        for rid, tokens in cached.items():
            self.abandon(rid)
            self._finished += 1
            self._cached += tokens or 0

    def abandon(self, rid: str) -> None:
        where = self._flying.pop(rid, None)
        if where is not None:
            rank, flops = where
            self._load[rank] -= 1
            self._flops[rank] -= flops

    def withdraw(self, rid: str) -> None:
        self._waiting.pop(rid, None)

    def withdraw_all(self) -> list[Request]:
        gone = list(self._waiting.values())
        self._waiting.clear()
        return gone

    def outstanding(self, rank: int) -> int:
        return self._flops[rank]

    def threshold(self, rank: int) -> float:
        return 0.0

    def snapshot(self) -> dict[str, Any]:
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
