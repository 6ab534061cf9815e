"""One client's work does not hold up another's: bounds on waiting, shares, order, and prefixes all the same."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_moe import COST

from asyncep_router.block_view import BlockView
from asyncep_router.config import Limits
from asyncep_router.errors import ConfigError
from asyncep_router.messages import BatchReport, Dispatch, Reason, Request
from asyncep_router.routing_policy import RoutingPolicy

BLOCK = 16
THOUSAND = COST.flops(1000)
BATCH = 4 * THOUSAND


class House:
    """A frontend with ranks that compute a batch each per step, oldest first, and what was sent in which order."""

    def __init__(self, ranks: int = 1, **limits: Any) -> None:
        settings = Limits(block=BLOCK, default_threshold=BATCH, **limits)
        self.front = RoutingPolicy(COST, BlockView(10**7, BLOCK), settings)
        self.ranks = ranks
        self.now = 0.0
        self.sent: list[Dispatch] = []
        self.flying: list[list[Dispatch]] = [[] for _ in range(ranks)]
        self.count = 0
        for rank in range(ranks):
            self.front.rank_joined(rank)

    def submit(self, tokens: int = 200, *, shared: int = 0, group: int = 0, rid: str = "", **more: Any) -> str:
        """A prompt of its own, but for what it shares with its group."""
        self.count += 1
        rid = rid or f"r{self.count}"
        own = [10**6 + self.count] * (tokens - shared)
        self.front.submit(Request(rid, array("q", [1000 + group] * shared + own), self.now, **more), self.now)
        return rid

    def list_of(self, count: int, client: str = "", flow: str = "a list", **more: Any) -> list[str]:
        return [self.submit(client=client, flow=flow, company=count, **more) for _ in range(count)]

    def poll(self) -> list[Dispatch]:
        sent = self.front.poll(self.now)
        for each in sent:
            self.flying[each.rank].append(each)
        self.sent += sent
        if self.front.pending < 50:  # it walks everything
            self.front.check_integrity()
        return sent

    def step(self, seconds: float = 1.0) -> list[Dispatch]:
        """Every rank finishes a batch; what is sent in consequence."""
        self.now += seconds
        for rank, waiting in enumerate(self.flying):
            batch: list[Dispatch] = []
            while waiting and sum(each.flops for each in batch) < BATCH:
                batch.append(waiting.pop(0))
            if batch:
                self.front.report(BatchReport(rank, tuple(each.rid for each in batch), 1.0, seconds), self.now)
        return self.poll()

    def run(self, most: int = 10_000) -> None:
        """Until everything is computed."""
        for _ in range(most):
            if not self.front.pending and not any(self.flying):
                return
            self.step()
        raise AssertionError(f"{self.front.pending} requests were never sent")


@dataclass(frozen=True)
class Greed:
    """What one greedy client sends."""

    kind: str
    count: int
    tokens: int
    priority: int


GREED = st.builds(
    Greed,
    st.sampled_from(["list", "lists", "singles", "named rank", "named list", "samples"]),
    st.integers(1, 60),
    st.sampled_from([3, 50, 500, 3000]),
    st.sampled_from([0, 0, 0, -1, -5]),
)


def load(house: House, greed: Greed, client: str) -> None:
    more: dict[str, Any] = {"tokens": greed.tokens, "priority": greed.priority, "client": client}
    if greed.kind == "singles":
        for _ in range(greed.count):
            house.submit(**more)
    elif greed.kind == "named rank":
        for _ in range(greed.count):
            house.submit(**more, pinned=0)
    elif greed.kind == "named list":
        house.list_of(greed.count, **more, pinned=0)
    elif greed.kind == "samples":
        house.list_of(greed.count, shared=greed.tokens - 1, **more)
    elif greed.kind == "lists":
        for number in range(greed.count):
            house.list_of(3, flow=f"list {number}", **more)
    else:
        house.list_of(greed.count, **more)


@given(
    ranks=st.integers(1, 3),
    greedy=st.lists(GREED, min_size=1, max_size=4),
    steps=st.integers(0, 5),
    later=st.lists(GREED, max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_a_single_request_waits_for_what_ranks_have_and_a_window_of_each_other_client(
    ranks: int, greedy: list[Greed], steps: int, later: list[Greed]
) -> None:
    house = House(ranks)
    for number, greed in enumerate(greedy):
        load(house, greed, f"greedy {number}")
    house.poll()
    for _ in range(steps):
        house.step()
    before = len(house.sent)
    house.submit(rid="mine", client="me")
    for number, greed in enumerate(later):
        load(house, greed, f"late {number}")
    house.poll()
    while not any(each.rid == "mine" for each in house.sent):
        assert house.step(), "nobody was sent and mine still waits"
    turn = next(number for number, each in enumerate(house.sent) if each.rid == "mine")
    window = house.front.limits.window * house.front.gate.capacity
    passed: dict[str, list[int]] = {}
    for each in house.sent[before:turn]:
        passed.setdefault(each.request.client, []).append(each.flops)
    for flops in passed.values():
        # One request larger than the window may be quick, if it is all that its client has.
        assert sum(flops) <= window or len(flops) == 1
    # Two batches are what the ranks were given before, plus what the last request overshoots.
    assert all(
        sum(each.flops for each in flying[:-1]) <= 2 * BATCH + sum(map(sum, passed.values())) for flying in house.flying
    )
    house.run()


def test_a_single_request_passes_a_long_list_at_once_when_a_rank_has_room() -> None:
    house = House()
    house.list_of(300)
    house.poll()
    house.submit(rid="mine")  # of the same client: without keys there are no others
    assert house.poll() == []
    assert house.step()[0].rid == "mine"


def test_a_short_list_is_quick_and_a_long_one_is_not() -> None:
    house = House()
    house.list_of(300)
    house.poll()
    short = house.list_of(5, flow="short")  # 1,000 tokens, the window
    assert [each.rid for each in house.step()[:5]] == short
    waiting = house.front.snapshot()["pending_bulk"]
    house.list_of(6, flow="long")
    assert house.front.snapshot()["pending_bulk"] == waiting + 6


def test_ten_thousand_single_requests_of_one_client_let_others_pass() -> None:
    house = House(2)
    for _ in range(600):
        house.submit(50, client="greedy")
    house.poll()
    house.step()
    house.submit(rid="mine", client="me")
    assert house.step()[0].rid == "mine"
    order = [int(each.rid[1:]) for each in house.sent if each.request.client == "greedy"]
    assert order == sorted(order)
    house.run()
    order = [int(each.rid[1:]) for each in house.sent if each.request.client == "greedy"]
    assert order == sorted(order), "a client's requests go in the order in which they came"


@pytest.mark.parametrize("named", [False, True])
def test_long_lists_and_lower_priorities_keep_a_share_while_others_never_cease(named: bool) -> None:
    house = House(starve_after=5)
    pinned = 0 if named else None
    mine = set(house.list_of(100, client="list", pinned=pinned))
    low = {house.submit(priority=-1, client="low", pinned=pinned) for _ in range(100)}
    house.poll()
    start = len(house.sent)
    for step in range(200):
        for number in range(30):  # more than a batch each step, from ever other clients
            house.submit(client=f"{step} {number}")
        house.step()
        if house.now == 10:
            start = len(house.sent)
        if mine | low <= {each.rid for each in house.sent}:
            break
    else:
        raise AssertionError("they starve")
    late = house.sent[start:]
    share = sum(each.flops for each in late if each.rid in mine | low) / sum(each.flops for each in late)
    assert 0.2 < share < 0.3
    # The older of them first, whatever their class: nobody waits for ever.
    order = [each.rid for each in late if each.rid in mine | low]
    assert order == sorted(order, key=lambda rid: int(rid[1:]))


@given(lists=st.integers(1, 12), tokens=st.sampled_from([100, 200, 900]))
@settings(max_examples=8, deadline=None)
def test_clients_share_equally_however_many_lists_each_sends(lists: int, tokens: int) -> None:
    house = House()
    for number in range(lists):
        house.list_of(30_000 // tokens, client="many", flow=str(number), tokens=tokens)
    house.list_of(150, client="one", tokens=200)
    house.poll()
    while len([each for each in house.sent if each.request.client == "one"]) < 100:
        house.step()
    got = {
        client: sum(each.flops for each in house.sent if each.request.client == client) for client in ("one", "many")
    }
    # Turns are a batch long.
    assert abs(got["one"] - got["many"]) <= 2 * BATCH
    assert house.front.counters.dispatched == len(house.sent)


def test_a_new_list_shares_from_now_on_and_has_nothing_to_catch_up_with() -> None:
    house = House()
    house.list_of(600, client="old")
    house.poll()
    for _ in range(10):
        house.step()
    house.list_of(600, client="new")
    start = len(house.sent)
    for _ in range(10):
        house.step()
    got = [sum(e.flops for e in house.sent[start:] if e.request.client == client) for client in ("old", "new")]
    assert abs(got[0] - got[1]) <= 2 * BATCH
    assert min(got) > 0


def test_a_list_computes_each_prefix_once_beside_single_requests_of_others() -> None:
    house = House(2)
    for group in list(range(6)) * 20:
        house.submit(704, shared=640, group=group, client="list", flow="l", company=120)
    house.poll()
    for number in range(10):
        house.submit(client=f"single {number}")
        house.step()
    house.run()
    misses = [each for each in house.sent if each.request.client == "list" and each.cached < 640]
    assert len(misses) <= 7  # one each, and at most one stolen at the end


def test_named_ranks_wait_for_room_like_everybody_else() -> None:
    house = House(2)
    house.list_of(200, client="named", pinned=0)
    sent = house.poll()
    assert {each.rank for each in sent} == {0}
    assert all(each.reason is Reason.PINNED for each in sent)
    assert sum(each.flops for each in sent[:-1]) < 2 * BATCH
    house.submit(rid="mine", pinned=0, client="me")
    assert house.step()[0].rid == "mine"
    house.run()
    assert len(house.sent) == 201


def test_a_rank_is_given_no_more_than_so_many_requests_however_small() -> None:
    house = House(2, most_requests=5)
    house.list_of(50, tokens=3, client="list")
    assert len(house.poll()) == 10
    assert all(len(flying) == 5 for flying in house.flying)
    assert house.poll() == []
    house.submit(rid="mine", client="me")
    assert house.step()[0].rid == "mine"
    house.run()
    assert len(house.sent) == 51


def test_what_is_sent_says_whether_others_may_pass_it() -> None:
    house = House()
    house.list_of(50, client="list")
    house.submit(rid="mine", client="me")
    assert [(each.rid == "mine") for each in house.poll()] == [not each.bulk for each in house.sent]


def test_a_death_returns_requests_to_where_they_were() -> None:
    house = House(2)
    house.list_of(100, client="list")
    house.submit(rid="mine", client="me")
    sent = house.poll()
    assert sent[0].rid == "mine"
    dead = sent[0].rank
    returned = house.front.rank_died(dead)
    assert "mine" in {request.rid for request in returned}
    house.flying[dead] = []
    house.front.check_integrity()
    assert house.step()[0].rid == "mine"
    house.front.rank_joined(dead)
    house.run()
    assert len({each.rid for each in house.sent}) == 101


@pytest.mark.parametrize("name", ["window", "least_share"])
@pytest.mark.parametrize("value", [0, 1, -0.5, float("nan")])
def test_shares_lie_between_nothing_and_all(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: value})  # type: ignore[arg-type] # the names are fields of that type


@given(
    ranks=st.integers(1, 3),
    greedy=st.lists(GREED, min_size=1, max_size=3),
    steps=st.integers(0, 5),
    singles=st.lists(st.tuples(st.sampled_from([3, 50, 500]), st.sampled_from([None, 0])), min_size=1, max_size=30),
)
@settings(max_examples=40, deadline=None)
def test_quick_requests_go_to_ranks_full_of_bulk_up_to_a_limit_of_their_own(
    ranks: int, greedy: list[Greed], steps: int, singles: list[tuple[int, int | None]]
) -> None:
    house = House(ranks, ranks_let_pass=True)
    for greed in greedy:
        load(house, greed, "greedy")
    house.poll()
    for _ in range(steps):
        house.step()
    gate, ledger = house.front.gate, house.front.ledger
    before = {rank: ledger.account(rank).outstanding - ledger.account(rank).quick for rank in range(ranks)}
    for number, (tokens, rank) in enumerate(singles):
        house.submit(tokens, client=f"client {number}", pinned=rank)
        house.poll()
        if tokens < 500 and rank is None and gate.express:
            assert house.sent[-1].rid == f"r{house.count}", "a rank has room for it and it waits"
    for rank in range(ranks):
        account = ledger.account(rank)
        largest = max((c.flops for c in account.in_flight.values() if not c.bulk), default=0)
        assert account.quick < gate.limit(rank) + largest
        # Bulk is sent to nobody who has no room for it.
        assert account.outstanding - account.quick <= max(before[rank], gate.limit(rank) + 3 * THOUSAND)
    house.run()


def test_ranks_that_keep_their_own_order_get_no_more_than_they_have_room_for() -> None:
    house = House()
    house.list_of(200)
    house.poll()
    house.submit(rid="mine", client="me")
    assert not house.poll()
    passing = House(ranks_let_pass=True)
    passing.list_of(200)
    passing.poll()
    passing.submit(rid="mine", client="me")
    (sent,) = passing.poll()
    assert sent.rid == "mine"
    assert not sent.bulk
