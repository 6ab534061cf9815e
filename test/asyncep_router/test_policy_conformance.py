"""What every `Policy` owes its caller, ours and other routers': nothing lost, nothing sent twice, nobody overrun."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_configs import QWEN3_30B
from small_moe import COST

from asyncep_router.baselines import BaselinePolicy, CacheAware, PowerOfTwo, Random, RoundRobin, ShortestQueue
from asyncep_router.block_view import BlockView
from asyncep_router.config import Limits
from asyncep_router.cost import ModelCost
from asyncep_router.errors import DuplicateRequestError, UnknownRankError
from asyncep_router.messages import BatchReport, Request
from asyncep_router.routing_policy import RoutingPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncep_router.policy import Policy

RANKS = 3


def _ours() -> Policy:
    return RoutingPolicy(COST, BlockView(10**6, 16), Limits(block=16, default_threshold=COST.flops(100)))


POLICIES: dict[str, Callable[[], Policy]] = {
    "asyncep": _ours,
    "round_robin": lambda: BaselinePolicy(RoundRobin, COST),
    "random": lambda: BaselinePolicy(lambda: Random(1), COST),
    "power_of_two": lambda: BaselinePolicy(lambda: PowerOfTwo(1), COST),
    "shortest_queue": lambda: BaselinePolicy(ShortestQueue, COST),
    "cache_aware": lambda: BaselinePolicy(CacheAware, COST),
}
each_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=list(POLICIES))


def request(rid: str, tokens: int = 8, now: float = 0.0, pinned: int | None = None, first: int = 0) -> Request:
    return Request(rid, array("q", range(first, first + tokens)), now, pinned=pinned)


def joined(make: Callable[[], Policy], ranks: int = RANKS) -> Policy:
    policy = make()
    for rank in range(ranks):
        policy.rank_joined(rank)
    return policy


class Caller:
    """What a caller knows: every event told to a policy, and what it said."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.now = 0.0
        self.waiting: set[str] = set()
        self.flying: dict[str, int] = {}
        self.accepting = set(range(RANKS))
        self.pinned: dict[str, int] = {}
        self.number = 0

    def poll(self) -> None:
        for sent in self.policy.poll(self.now):
            assert sent.rid in self.waiting, "sent twice, or never submitted"
            assert sent.rank in self.accepting
            assert self.pinned.get(sent.rid, sent.rank) == sent.rank
            self.waiting.remove(sent.rid)
            self.flying[sent.rid] = sent.rank
        assert self.policy.pending == len(self.waiting)
        for rank in range(RANKS):
            assert (self.policy.outstanding(rank) > 0) == (rank in self.flying.values())

    def submit(self, tokens: int, first: int, pinned: int | None) -> None:
        rid = f"r{self.number}"
        self.number += 1
        self.waiting.add(rid)
        if pinned is not None:
            self.pinned[rid] = pinned
        self.policy.submit(request(rid, tokens, self.now, pinned, first), self.now)

    def finish(self, rank: int) -> None:
        done = [rid for rid, where in self.flying.items() if where == rank]
        for rid in done:
            del self.flying[rid]
        self.policy.report(BatchReport(rank, tuple(done)), self.now)

    def die(self, rank: int) -> None:
        lost = {rid for rid, where in self.flying.items() if where == rank}
        assert {request.rid for request in self.policy.rank_died(rank)} == lost
        for rid in lost:
            del self.flying[rid]
        self.waiting |= lost
        self.accepting.discard(rank)

    def accept(self, rank: int, accepting: bool) -> None:
        self.policy.set_accepting(rank, accepting)
        (self.accepting.add if accepting else self.accepting.discard)(rank)

    def abandon(self) -> None:
        if self.flying:
            rid = min(self.flying)
            assert self.policy.abandon(rid)
            del self.flying[rid]
        assert not self.policy.abandon("nobody")

    def abort(self, rid: str) -> None:
        gone = {request.rid for request in self.policy.abort(rid)}
        assert gone == {rid} & self.waiting
        self.waiting -= gone


ranks = st.integers(0, RANKS - 1)
pinned = st.one_of(st.none(), st.none(), ranks)
events = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 200), st.sampled_from([0, 1000, 2000]), pinned),
        st.tuples(st.just("finish"), ranks),
        st.tuples(st.just("die"), ranks),
        st.tuples(st.just("accept"), ranks, st.booleans()),
        st.tuples(st.just("abandon")),
        st.tuples(st.just("abort"), st.integers(0, 30).map(lambda number: f"r{number}")),
    ),
    max_size=60,
)


@each_policy
@given(story=events)
@settings(max_examples=60)
def test_nothing_is_lost_or_sent_twice(make: Callable[[], Policy], story: list[tuple[object, ...]]) -> None:
    caller = Caller(joined(make))
    for what, *arguments in story:
        caller.now += 0.01
        getattr(caller, str(what))(*arguments)
        caller.poll()
    for rank in range(RANKS):
        caller.policy.rank_joined(rank)
        caller.accepting.add(rank)
    for _ in range(len(caller.waiting) + 1):
        caller.now += 1.0
        caller.poll()
        for rank in range(RANKS):
            caller.finish(rank)
    caller.poll()
    assert not caller.waiting, "what waits is served once every rank takes work"


@each_policy
def test_no_rank_is_asked_before_it_takes_work(make: Callable[[], Policy]) -> None:
    policy = make()
    policy.submit(request("a"), 0.0)
    assert policy.poll(0.0) == []
    policy.rank_joined(0)
    policy.set_accepting(0, False)
    assert policy.poll(0.0) == []
    policy.set_accepting(0, True)
    assert [sent.rid for sent in policy.poll(0.0)] == ["a"]


@each_policy
def test_a_rank_on_trial_has_one_request_at_a_time(make: Callable[[], Policy]) -> None:
    policy = joined(make, 1)
    policy.set_accepting(0, True, trial=True)
    for number in range(6):
        policy.submit(request(f"r{number}", first=100 * number), 0.0)
    for _ in range(3):
        (sent,) = policy.poll(0.0)
        assert policy.poll(0.0) == []
        policy.report(BatchReport(0, (sent.rid,)), 0.0)
    policy.set_accepting(0, True)
    assert len(policy.poll(0.0)) == 3, "the trial is over"


@each_policy
def test_an_id_is_taken_while_it_waits_or_flies(make: Callable[[], Policy]) -> None:
    policy = joined(make, 1)
    policy.submit(request("a"), 0.0)
    with pytest.raises(DuplicateRequestError):
        policy.submit(request("a"), 0.0)
    policy.poll(0.0)
    with pytest.raises(DuplicateRequestError):
        policy.submit(request("a"), 0.0)
    policy.report(BatchReport(0, ("a",)), 0.0)
    policy.submit(request("a"), 0.0)


@each_policy
def test_ranks_that_never_joined_are_named(make: Callable[[], Policy]) -> None:
    policy = joined(make, 1)
    with pytest.raises(UnknownRankError):
        policy.submit(request("a", pinned=7), 0.0)
    with pytest.raises(UnknownRankError):
        policy.set_accepting(7, True)
    with pytest.raises(UnknownRankError):
        policy.rank_joined(-1)


@each_policy
def test_another_cost_model_counts_from_then_on(make: Callable[[], Policy]) -> None:
    """The HTTP router begins with a stand-in and learns the model's shape later."""
    policy = joined(make, 1)
    for cost in (COST, ModelCost.from_config(QWEN3_30B)):
        policy.cost = cost
        policy.submit(request("a", tokens=50), 0.0)
        (sent,) = policy.poll(0.0)
        assert sent.flops == policy.outstanding(0) == cost.flops(50)
        policy.report(BatchReport(0, ("a",)), 0.0)
        policy.cache_cleared(0)


@each_policy
def test_everything_can_be_withdrawn_and_seen(make: Callable[[], Policy]) -> None:
    policy = joined(make, 1)
    policy.set_accepting(0, False)
    for rid in ("ab", "ac", "b"):
        policy.submit(request(rid), 0.0)
    assert policy.snapshot()["pending"] == 3
    assert {found.rid for found in policy.abort("a", prefix=True)} == {"ab", "ac"}
    assert [found.rid for found in policy.abort(everything=True)] == ["b"]
    assert policy.abort("b") == []
    assert policy.pending == 0
    assert policy.snapshot()["ranks"][0]["accepting"] is False
