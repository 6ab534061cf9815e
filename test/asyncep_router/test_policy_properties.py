"""Whatever happens, in whatever order: the frontend loses nothing, counts right and keeps its promises."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from small_moe import COST

from asyncep_router.block_view import BlockView
from asyncep_router.config import Limits
from asyncep_router.messages import BatchReport, Dispatch, Request
from asyncep_router.routing_policy import RoutingPolicy

if TYPE_CHECKING:
    from asyncep_router.prefix import PrefixView

BLOCK = 4
RANKS = 3
PATIENCE = 20


class FrontendMachine(RuleBasedStateMachine):
    """Drives two equal frontends: what one does the other must do too (determinism)."""

    max_wait = 0.0
    least_batch = 0.0
    gathers = False
    ranks_let_pass = False

    def view(self) -> PrefixView:
        return BlockView(400, BLOCK)

    def __init__(self) -> None:
        super().__init__()
        limits = Limits(
            block=BLOCK,
            default_threshold=COST.flops(40),
            starve_after=PATIENCE,
            max_wait=self.max_wait,
            least_batch=self.least_batch,
            ranks_let_pass=self.ranks_let_pass,
        )
        self.fronts = [RoutingPolicy(COST, self.view(), limits) for _ in range(2)]
        self.now = 0.0
        self.next = 0
        self.waiting: dict[str, Request] = {}
        self.aside: dict[str, Request] = {}
        self.flying: dict[str, Dispatch] = {}
        self.sent_at: dict[str, float] = {}
        self.settled: dict[int, int] = dict.fromkeys(range(RANKS), 0)
        self.alive: set[int] = set()
        for rank in range(RANKS):
            self._join(rank)

    def _join(self, rank: int) -> None:
        self.alive.add(rank)
        for front in self.fronts:
            front.rank_joined(rank, cache_tokens=160 if rank == 1 else None, gathers=self.gathers)

    @rule(
        group=st.integers(0, 3),
        shared=st.integers(0, 40),
        tail=st.integers(1, 30),
        priority=st.sampled_from([0, 0, 0, 2]),
        patience=st.sampled_from([None, None, 3.0]),
        pinned=st.sampled_from([None, None, None, None, 1]),
        client=st.sampled_from(["", "a", "b"]),
        company=st.sampled_from([1, 1, 2, 50]),
    )
    def submit(
        self,
        group: int,
        shared: int,
        tail: int,
        priority: int,
        patience: float | None,
        pinned: int | None,
        client: str,
        company: int,
    ) -> None:
        rid = f"r{self.next}"
        tokens = array("q", [group] * shared + [100 + self.next % 5] * tail)
        self.next += 1
        deadline = None if patience is None else self.now + patience
        request = Request(
            rid,
            tokens,
            self.now,
            priority=priority,
            deadline=deadline,
            pinned=pinned,
            client=client,
            flow=f"list {company}" if company > 1 else "",
            company=company,
        )
        self.waiting[rid] = request
        for front in self.fronts:
            front.submit(request, self.now)

    @rule(seconds=st.sampled_from([0.0, 1.0, 7.0]))
    def poll(self, seconds: float) -> None:
        self.now += seconds
        sent, twin = (front.poll(self.now) for front in self.fronts)
        assert sent == twin
        for dispatch in sent:
            assert dispatch.rank in self.alive
            request = self.waiting.pop(dispatch.rid)  # a KeyError here: sent twice, or after an abort
            assert request.pinned in (None, dispatch.rank)
            assert dispatch.flops == max(1, COST.flops(len(request.token_ids) - dispatch.cached, dispatch.cached))
            self.flying[dispatch.rid] = dispatch
            self.sent_at[dispatch.rid] = self.now
        idle = self.alive - {dispatch.rank for dispatch in self.flying.values()}
        loose = [r for r in self.waiting.values() if r.pinned is None]
        for request in loose:
            if self.alive:
                assert request.deadline is None or request.deadline > self.now
        if idle and loose:
            # What waits although a rank is idle waits for company, or for a prefix on its way, and not for ever.
            since = [self._prefix_under_way_since(request) for request in loose]
            wakeup = self.fronts[0].next_wakeup(self.now)
            assert wakeup is not None
            if None in since:
                assert all(request.arrival + self.max_wait > self.now for request in loose)
                assert wakeup <= min(r.arrival for r in loose) + self.max_wait
            else:
                assert wakeup <= self.now + PATIENCE

    def _prefix_under_way_since(self, request: Request) -> float | None:
        """When a request was sent that an alive rank has not reported, shares a block and may be waited for."""
        opening = request.token_ids[:BLOCK]
        if len(opening) < BLOCK:
            return None
        times = [
            self.sent_at[d.rid]
            for d in self.flying.values()
            if d.rank in self.alive and d.request.token_ids[:BLOCK] == opening
        ]
        return max((at for at in times if at + PATIENCE > self.now), default=None)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), size=st.integers(1, 6))
    def report(self, data: st.DataObject, size: int) -> None:
        rank = data.draw(st.sampled_from(sorted({d.rank for d in self.flying.values()})))
        batch = [d for d in self.flying.values() if d.rank == rank][:size]
        for front in self.fronts:
            done = front.report(BatchReport(rank, tuple(d.rid for d in batch), 1.0, 1.0), self.now)
            assert [charge.rid for charge in done] == [d.rid for d in batch]
        for dispatch in batch:
            self.settled[rank] += dispatch.flops
            del self.flying[dispatch.rid]

    @rule(rank=st.integers(0, RANKS - 1))
    def die(self, rank: int) -> None:
        lost = [d.request for d in self.flying.values() if d.rank == rank]
        for front in self.fronts:
            returned = front.rank_died(rank)
            assert sorted(r.rid for r in returned) == sorted(r.rid for r in lost)
            numbers = [int(r.rid[1:]) for r in returned]
            assert numbers == sorted(numbers)
        self.alive.discard(rank)
        for request in lost:
            del self.flying[request.rid]
            self.waiting[request.rid] = request

    @rule(rank=st.integers(0, RANKS - 1))
    def join(self, rank: int) -> None:
        self._join(rank)

    @rule(rank=st.integers(0, RANKS - 1))
    def flush(self, rank: int) -> None:
        for front in self.fronts:
            front.cache_cleared(rank)

    @precondition(lambda self: self.waiting or self.flying or self.aside)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        rid = data.draw(st.sampled_from(sorted([*self.waiting, *self.flying, *self.aside])))
        for front in self.fronts:
            withdrawn = [request.rid for request in front.abort(rid)]
            assert withdrawn == ([rid] if rid not in self.flying else [])
        self.waiting.pop(rid, None)
        self.aside.pop(rid, None)

    @precondition(lambda self: self.waiting or self.flying)
    @rule(data=st.data())
    def set_aside(self, data: st.DataObject) -> None:
        rid = data.draw(st.sampled_from(sorted([*self.waiting, *self.flying])))
        for front in self.fronts:
            assert front.set_aside(rid) == (rid in self.waiting)
        if rid in self.waiting:
            self.aside[rid] = self.waiting.pop(rid)

    @precondition(lambda self: self.aside)
    @rule(data=st.data(), accepting=st.booleans())
    def send_alone(self, data: st.DataObject, accepting: bool) -> None:
        rid = data.draw(st.sampled_from(sorted(self.aside)))
        request = self.aside.pop(rid)
        rank = data.draw(st.sampled_from(sorted(self.alive or {0}))) if request.pinned is None else request.pinned
        sent = [self._send_alone(front, rid, rank, accepting) for front in self.fronts]
        assert sent[0] == sent[1]
        assert (sent[0].rid, sent[0].rank) == (rid, rank)
        self.flying[rid] = sent[0]
        self.sent_at[rid] = self.now

    def _send_alone(self, front: RoutingPolicy, rid: str, rank: int, accepting: bool) -> Dispatch:
        """Whether the rank takes work does not matter, before or after."""
        if rank in self.alive and not accepting:
            front.set_accepting(rank, False)
        dispatch = front.send_alone(rid, rank, self.now)
        assert dispatch is not None
        assert front.send_alone(rid, rank, self.now) is None
        if rank in self.alive and not accepting:
            front.set_accepting(rank, True)
        return dispatch

    @invariant()
    def books_agree(self) -> None:
        for front in self.fronts:
            front.check_integrity()
            assert front.pending == len(self.waiting)
            for rank in range(RANKS):
                account = front.ledger.account(rank)
                assert account.settled == self.settled[rank]
                assert account.outstanding == sum(d.flops for d in self.flying.values() if d.rank == rank)

    def teardown(self) -> None:
        """In the end everything is dispatched, if only one rank lives."""
        for rank in range(RANKS):
            self._join(rank)
        for rid, request in list(self.aside.items()):
            dispatches = [front.send_alone(rid, request.pinned or 0, self.now) for front in self.fronts]
            assert dispatches[0] is not None
            self.flying[rid] = dispatches[0]
            self.sent_at[rid] = self.now
        self.aside.clear()
        for _ in range(1000):
            self.poll(1.0)
            if not self.flying and not self.waiting:
                return
            for rank in sorted({d.rank for d in self.flying.values()}):
                batch = [d for d in self.flying.values() if d.rank == rank]
                for front in self.fronts:
                    front.report(BatchReport(rank, tuple(d.rid for d in batch)), self.now)
                for dispatch in batch:
                    self.settled[rank] += dispatch.flops
                    del self.flying[dispatch.rid]
        raise AssertionError(f"{len(self.waiting)} requests were never dispatched")


class WaitingMachine(FrontendMachine):
    """The same promises when requests may wait for company."""

    max_wait = 2.0


class SmallThresholdMachine(WaitingMachine):
    """The same when batches are more than T, and ranks gather."""

    least_batch = float(COST.flops(120))
    gathers = True


class PassingMachine(SmallThresholdMachine):
    """The same when quick requests go to ranks that are full of bulk."""

    ranks_let_pass = True


class RadixMachine(FrontendMachine):
    """The same promises on SGLang's tree."""

    def view(self) -> PrefixView:
        return pytest.importorskip("asyncep_router.radix").SharedRadixTree(400, BLOCK)  # type: ignore[no-any-return]


TestFrontendOnRadixTree = RadixMachine.TestCase
TestFrontendOnRadixTree.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestFrontend = FrontendMachine.TestCase
TestFrontend.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestFrontendWithSmallThreshold = SmallThresholdMachine.TestCase
TestFrontendWithSmallThreshold.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestFrontendWithWaiting = WaitingMachine.TestCase
TestFrontendWithWaiting.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestFrontendWithPassing = PassingMachine.TestCase
TestFrontendWithPassing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
