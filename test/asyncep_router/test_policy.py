"""The frontend's rules, one by one, on small examples with an invented clock."""

from __future__ import annotations

from array import array
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_moe import COST, SMALL_MOE

from asyncep_router.block_view import BlockView
from asyncep_router.config import Limits
from asyncep_router.cost import ModelCost
from asyncep_router.errors import ConfigError, DuplicateRequestError, UnknownRankError
from asyncep_router.messages import BatchReport, Dispatch, Reason, Request
from asyncep_router.routing_policy import RoutingPolicy

BLOCK = 16
THOUSAND = COST.flops(1000)


def frontend(ranks: int = 2, threshold: float = 4 * THOUSAND, gathers: bool = False, **limits: Any) -> RoutingPolicy:
    front = RoutingPolicy(COST, BlockView(10**7, BLOCK), Limits(block=BLOCK, default_threshold=threshold, **limits))
    for rank in range(ranks):
        front.rank_joined(rank, gathers=gathers)
    return front


def prompt(group: int, shared: int, own: int, tail: int) -> array[int]:
    """`shared` tokens common to a group, then `tail` tokens of this request alone."""
    return array("q", [1000 + group] * shared + [own] * tail)


def request(rid: str, tokens: array[int], at: float = 0.0, **more: Any) -> Request:
    return Request(rid, tokens, at, **more)


def run(front: RoutingPolicy, *requests: Request, now: float = 0.0) -> list[Dispatch]:
    for each in requests:
        front.submit(each, now)
    sent = front.poll(now)
    front.check_integrity()
    return sent


def done(front: RoutingPolicy, *sent: Dispatch, now: float = 0.0) -> None:
    for each in sent:
        front.report(BatchReport(each.rank, (each.rid,), each.flops, 1.0), now)


def test_ten_requests_with_one_prefix_are_charged_one_prefix_and_ten_suffixes() -> None:
    front = frontend(threshold=1e15)
    sent = run(front, *(request(f"r{i}", prompt(0, 4096, i, 64)) for i in range(10)))
    assert {d.rank for d in sent} == {0}
    assert [d.cached for d in sent] == [0] + [4096] * 9
    assert sum(d.flops for d in sent) == COST.flops(4160) + COST.batch_flops([(64, 4096)] * 9)
    assert front.ledger.account(0).outstanding == sum(d.flops for d in sent)


def test_f1_longest_prefix_among_ranks_below_t() -> None:
    front = frontend(3)
    long, short = prompt(0, 512, 1, 16), prompt(0, 256, 2, 16)
    front.view.insert(1, short[:256])
    front.view.insert(2, long[:512])
    (sent,) = run(front, request("a", long))
    assert (sent.rank, sent.reason, sent.cached) == (2, Reason.LONGEST_PREFIX, 512)


def test_f1_passes_over_a_rank_at_t() -> None:
    front = frontend(3, threshold=THOUSAND, inflight_target=1)
    front.view.insert(1, prompt(0, 256, 0, 0))
    front.view.insert(2, prompt(0, 512, 0, 0))
    run(front, request("big", prompt(9, 1200, 0, 0), pinned=2))
    (sent,) = run(front, request("a", prompt(0, 512, 1, 16)))
    assert (sent.rank, sent.cached) == (1, 256)


def test_f3_fills_one_rank_to_t_then_the_next() -> None:
    front = frontend(4)
    sent = run(front, *(request(f"r{i}", prompt(i, 1000, 0, 0)) for i in range(9)))
    ranks = [d.rank for d in sent]
    assert ranks[:8] == sorted(ranks[:8])
    assert [ranks.count(r) for r in range(3)] == [4, 4, 1]
    assert sent[0].reason is Reason.LEAST_FLOPS
    assert sent[1].reason is Reason.FILL


def test_each_rule_can_be_left_out() -> None:
    # F1: the rank with the longest prefix is passed over for one that is filling.
    front = frontend(without=frozenset({"F1"}))
    front.view.insert(1, prompt(0, 512, 0, 0))
    run(front, request("first", prompt(9, 100, 0, 0), pinned=0))
    (sent,) = run(front, request("a", prompt(0, 512, 1, 16)))
    assert (sent.rank, sent.cached) == (0, 0)
    # F2: a prefix that is held is charged like any other tokens.
    front = frontend(without=frozenset({"F2"}))
    front.view.insert(1, prompt(0, 512, 0, 0))
    (sent,) = run(front, request("a", prompt(0, 512, 1, 16)))
    assert (sent.rank, sent.flops) == (1, COST.flops(528))
    # F3: work is spread although one rank would hold it below T.
    front = frontend(4, without=frozenset({"F3"}))
    sent = run(front, *(request(f"r{i}", prompt(i, 1000, 0, 0)) for i in range(4)))
    assert sorted(d.rank for d in sent) == [0, 1, 2, 3]


def test_light_load_is_gathered_on_one_rank() -> None:
    front = frontend(8)
    sent = [run(front, request(f"r{i}", prompt(i, 500, 0, 0)))[0] for i in range(4)]
    assert len({d.rank for d in sent}) == 1


def test_where_t_is_small_work_is_spread_at_once_and_batches_are_not_small() -> None:
    front = frontend(2, threshold=THOUSAND / 4, least_batch=2 * THOUSAND, inflight_target=2)
    few = run(front, *(request(f"few{i}", prompt(i, 400, 0, 0)) for i in range(2)))
    assert {d.rank for d in few} == {0, 1}
    run(front, *(request(f"many{i}", prompt(2 + i, 1000, 0, 0)) for i in range(10)))
    for rank in (0, 1):
        assert 4 * THOUSAND <= front.ledger.account(rank).outstanding < 5 * THOUSAND
    assert front.pending == 12 - len(front.ledger.account(0).in_flight) - len(front.ledger.account(1).in_flight)


@pytest.mark.parametrize(("gathers", "company", "at_once"), [(False, 3, 1), (True, 3, 4), (True, 40, 1)])
def test_company_waits_for_its_prefix_where_that_saves_time(gathers: bool, company: int, at_once: int) -> None:
    front = frontend(1, threshold=4 * THOUSAND, gathers=gathers)
    sent = run(front, request("first", prompt(0, 1600, 0, 32)))
    sent += run(front, *(request(f"r{i}", prompt(0, 1600, 1 + i, 128)) for i in range(company)))
    # With little work in all, a second batch would take as long as the first, however little is in it.
    assert len(sent) == at_once
    done(front, *sent)
    assert len(front.poll(1.0)) == 1 + company - at_once


def test_idle_ranks_take_turns_by_what_they_were_charged() -> None:
    front = frontend(4)
    ranks = []
    for i in range(8):
        (sent,) = run(front, request(f"r{i}", prompt(i, 1000, 0, 0)))
        done(front, sent)
        ranks.append(sent.rank)
    assert sorted(ranks) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_work_beyond_the_limit_waits_in_the_router() -> None:
    front = frontend(2, threshold=THOUSAND, inflight_target=2)
    sent = run(front, *(request(f"r{i}", prompt(i, 1000, 0, 0)) for i in range(10)))
    assert len(sent) == 4
    assert front.pending == 6
    done(front, sent[0])
    assert len(front.poll(1.0)) == 1


def test_requests_wait_for_the_rank_that_holds_their_prefix_unless_another_idles() -> None:
    front = frontend(2, threshold=THOUSAND, inflight_target=1)
    (first,) = run(front, request("p0", prompt(0, 960, 0, 64)))
    (other,) = run(front, request("p1", prompt(1, 960, 0, 64)))
    assert {first.rank, other.rank} == {0, 1}
    assert run(front, request("q0", prompt(0, 960, 1, 64))) == []  # rank 1 is busy: wait for rank 0
    done(front, first)
    (sent,) = front.poll(1.0)
    assert (sent.rank, sent.cached) == (first.rank, 960)
    # Now rank 1 idles while rank 0 is at T: it takes the work although it must compute the prefix.
    run(front, request("big", prompt(7, 1200, 0, 0), pinned=first.rank))
    done(front, other)
    (stolen,) = run(front, request("r0", prompt(0, 960, 2, 64)))
    assert (stolen.rank, stolen.reason, stolen.cached) == (other.rank, Reason.STEAL, 0)


def test_a_short_common_opening_does_not_bind() -> None:
    front = frontend(2, threshold=2 * THOUSAND, inflight_target=1)
    opening = [5] * 32
    sent = run(front, *(request(f"r{i}", array("q", opening + [10 + i] * 900)) for i in range(5)))
    assert sorted(d.rank for d in sent) == [0, 0, 0, 1, 1]


def test_prefix_groups_travel_together_and_each_prefix_is_computed_once() -> None:
    front = frontend(2, threshold=3 * THOUSAND)
    mixed = [request(f"g{g}-{i}", prompt(g, 640, 100 * g + i, 64)) for i in range(20) for g in range(6)]
    sent, time = run(front, *mixed), 0.0
    order = list(sent)
    while sent:
        time += 1
        done(front, *sent)
        sent = front.poll(time)
        order += sent
    assert len(order) == 120
    misses = [d for d in order if d.cached < 640]
    assert len(misses) <= 7  # one each, and at most one stolen at the end
    by_rank: dict[int, list[str]] = {0: [], 1: []}
    for d in order:
        by_rank[d.rank].append(d.rid.split("-")[0])
    for groups in by_rank.values():
        changes = sum(a != b for a, b in pairwise(groups))
        assert changes <= 2 * len(set(groups)) + 1


def test_priority_goes_first_and_starved_lower_classes_go_before_it() -> None:
    front = frontend(1, threshold=THOUSAND, inflight_target=1, starve_after=10)
    (first,) = run(front, request("first", prompt(0, 1100, 0, 0)))
    low = request("low", prompt(1, 1100, 0, 0), at=0.0, priority=0)
    high = [request(f"high{i}", prompt(2 + i, 1100, 0, 0), at=1.0, priority=5) for i in range(3)]
    assert run(front, low, *high) == []
    done(front, first)
    (second,) = front.poll(2.0)
    assert second.rid == "high0"
    done(front, second)
    (third,) = front.poll(11.0)
    assert third.rid == "low"


def test_deadline_sends_a_request_to_a_full_rank() -> None:
    front = frontend(1, threshold=THOUSAND, inflight_target=1)
    run(front, request("first", prompt(0, 1100, 0, 0)))
    assert run(front, request("late", prompt(1, 1100, 0, 0), deadline=5.0)) == []
    assert front.next_wakeup(0.0) == 5.0
    (sent,) = front.poll(5.0)
    assert (sent.rid, sent.reason) == ("late", Reason.DEADLINE)
    assert front.next_wakeup(5.0) is None


def test_little_work_waits_for_company_when_asked_to() -> None:
    front = frontend(2, max_wait=0.05)
    assert run(front, request("a", prompt(0, 500, 0, 0), at=1.0), now=1.0) == []
    assert front.next_wakeup(1.0) == pytest.approx(1.05)
    assert len(front.poll(1.05)) == 1
    assert len(run(front, request("b", prompt(1, 500, 0, 0), at=1.1), now=1.1)) == 1  # joins a busy rank
    front = frontend(2, max_wait=0.05)
    many = [request(f"m{i}", prompt(i, 1000, 0, 0), at=2.0) for i in range(5)]
    assert len(run(front, *many, now=2.0)) == 5  # enough to fill a batch: nothing to wait for


def test_company_of_a_prefix_that_is_being_computed_waits_for_it() -> None:
    front = frontend(2)
    (first,) = run(front, *(request(f"r{i}", prompt(0, 640, i, 16)) for i in range(10)))
    assert front.pending == 9
    # It may wait, and nothing else: other work goes ahead.
    assert [d.rid for d in run(front, request("other", prompt(1, 640, 0, 16)))] == ["other"]
    done(front, first)
    rest = front.poll(1.0)
    assert {d.rank for d in rest} == {first.rank}
    assert [d.cached for d in rest] == [640] * 9


def test_company_is_computed_twice_only_if_it_is_more_than_one_rank_may_hold() -> None:
    front = frontend(2, threshold=THOUSAND)
    sent = run(front, *(request(f"r{i}", prompt(0, 640, i, 64)) for i in range(100)))
    assert sorted(d.rank for d in sent) == [0, 1]
    assert [d.cached for d in sent] == [0, 0]
    time = 0.0
    while sent:
        time += 1
        done(front, *sent, now=time)
        sent = front.poll(time)
        assert all(d.cached == 640 for d in sent)
    assert front.pending == 0


def test_a_prefix_that_costs_little_to_repeat_holds_nobody_up() -> None:
    prompts = [request(f"r{i}", prompt(0, 16, i, 16)) for i in range(4)]
    assert len(run(frontend(2), *prompts)) == 4
    assert len(run(frontend(2, await_share=0), *prompts)) == 1


def test_waiting_for_a_prefix_ends_with_the_deadline_and_with_patience() -> None:
    front = frontend(2, starve_after=10)
    (first,) = run(front, request("a", prompt(0, 640, 0, 16), at=1.0), now=1.0)
    assert run(front, request("b", prompt(0, 640, 1, 16), at=8.0, deadline=9.0), now=8.0) == []
    assert run(front, request("c", prompt(0, 640, 2, 16), at=8.0), now=8.0) == []
    assert front.next_wakeup(8.0) == 9.0
    assert [d.rid for d in front.poll(9.0)] == ["b"]
    assert front.next_wakeup(9.0) == 11.0  # `starve_after` after the prefix was sent
    run(front, request("d", prompt(0, 640, 3, 16), at=10.0), now=10.0)
    # The rank that computes it seems to hang: an idle one begins anew, and the rest waits for that.
    (again,) = front.poll(11.0)
    assert (again.rid, again.rank, again.cached) == ("c", 1 - first.rank, 0)
    assert front.next_wakeup(11.0) == 21.0
    # No rank is idle now, and nobody waits for ever.
    assert [d.rid for d in front.poll(21.0)] == ["d"]
    assert front.next_wakeup(21.0) is None


@pytest.mark.parametrize("how", ["dies", "drains"])
def test_company_of_a_prefix_lost_or_shut_away_starts_anew(how: str) -> None:
    front = frontend(2)
    (first,) = run(front, *(request(f"r{i}", prompt(0, 640, i, 16)) for i in range(3)))
    if how == "dies":
        front.rank_died(first.rank)
    else:
        front.set_accepting(first.rank, False)
    (again,) = front.poll(1.0)
    front.check_integrity()
    assert (again.rank, again.cached) == (1 - first.rank, 0)
    done(front, again)
    assert [d.cached for d in front.poll(2.0)] == [640] * (2 if how == "dies" else 1)


def test_pinned_requests_go_to_their_rank_only() -> None:
    front = frontend(2)
    front.rank_died(1)
    assert run(front, request("a", prompt(0, 64, 0, 0), pinned=1)) == []
    front.rank_joined(1)
    (sent,) = front.poll(0.0)
    assert (sent.rank, sent.reason) == (1, Reason.PINNED)
    with pytest.raises(UnknownRankError, match="rank 7"):
        front.submit(request("b", prompt(0, 64, 0, 0), pinned=7), 0.0)


def test_a_dead_ranks_requests_wait_again_in_their_old_order() -> None:
    front = frontend(2, threshold=THOUSAND)
    sent = run(front, *(request(f"r{i}", prompt(i, 1000, 0, 0)) for i in range(8)))
    dead = [d for d in sent if d.rank == 0]
    returned = front.rank_died(0)
    front.check_integrity()
    assert [r.rid for r in returned] == [d.rid for d in dead]
    assert front.ledger.account(0).outstanding == 0
    assert front.ledger.account(0).returned == sum(d.flops for d in dead)
    done(front, *(d for d in sent if d.rank == 1))
    again = front.poll(1.0)
    assert [d.rid for d in again] == [d.rid for d in dead]
    assert {d.rank for d in again} == {1}
    front.rank_joined(0)
    assert len(front.poll(2.0)) == 2


def test_aborts_by_id_by_prefix_and_all() -> None:
    front = frontend(1, threshold=THOUSAND, inflight_target=1)
    run(front, *(request(f"job{i}", prompt(i, 1100, 0, 0)) for i in range(6)))
    assert front.abort("job0") == []  # in flight already
    assert [r.rid for r in front.abort("job3")] == ["job3"]
    assert [r.rid for r in front.abort("job", prefix=True)] == ["job1", "job2", "job4", "job5"]
    run(front, request("x", prompt(0, 1100, 0, 0)), request("y", prompt(0, 1100, 0, 0)))
    assert len(front.abort(everything=True)) == 2
    assert front.pending == 0
    assert front.abandon("job0")
    assert not front.abandon("job0")
    front.check_integrity()


def test_an_undelivered_request_waits_again() -> None:
    front = frontend(1)
    run(front, request("a", prompt(0, 64, 0, 0)))
    assert front.send_back("a")
    assert front.pending == 1
    assert [d.rid for d in front.poll(0.0)] == ["a"]
    front.check_integrity()


def test_duplicates_are_refused_while_alive_only() -> None:
    front = frontend(1)
    (sent,) = run(front, request("a", prompt(0, 64, 0, 0)))
    with pytest.raises(DuplicateRequestError, match="'a'"):
        front.submit(request("a", prompt(0, 64, 0, 0)), 0.0)
    done(front, sent)
    front.submit(request("a", prompt(0, 64, 0, 0)), 0.0)


def test_threshold_is_given_per_layer() -> None:
    front = frontend(1)
    front.set_threshold(0, 5e9)
    assert front.gate.threshold(0) == 8 * 5e9
    with pytest.raises(UnknownRankError):
        front.gate.threshold(5)


def test_a_draining_rank_takes_nothing_and_a_flushed_one_holds_nothing() -> None:
    front = frontend(2)
    (sent,) = run(front, request("a", prompt(0, 640, 0, 16)))
    front.set_accepting(sent.rank, False)
    (other,) = run(front, request("b", prompt(0, 640, 1, 16)))
    assert other.rank != sent.rank
    front.set_accepting(sent.rank, True)
    front.cache_cleared(other.rank)
    front.set_accepting(other.rank, False)
    done(front, sent)
    (third,) = run(front, request("c", prompt(0, 640, 2, 16)))
    assert (third.rank, third.cached) == (sent.rank, 640)


def test_a_rank_without_cache_is_charged_in_full() -> None:
    front = frontend(0)
    front.rank_joined(0, caches=False)
    sent = run(front, *(request(f"r{i}", prompt(0, 640, i, 16)) for i in range(3)))
    assert [d.cached for d in sent] == [0, 0, 0]


def test_a_prompt_held_whole_is_still_computed_from_its_last_page() -> None:
    front = frontend(1)
    sent = run(front, request("a", prompt(0, 64, 0, 0)), request("b", prompt(0, 64, 0, 0)))
    assert [d.cached for d in sent] == [0, 48]


def test_snapshot_shows_what_operators_need() -> None:
    front = frontend(2)
    (sent,) = run(front, request("a", prompt(0, 640, 0, 16)))
    front.report(BatchReport(sent.rank, ("a", "ghost"), 1e12, 0.5, {"a": 0}), 1.0)
    state = front.snapshot()
    assert state["finished"] == 1
    assert state["unknown_reports"] == 1
    assert state["ranks"][sent.rank]["flops_per_second"] == 2e12
    assert state["reasons"]["least_flops"] == 1


def test_bad_settings_are_named() -> None:
    for setting in (
        {"inflight_target": 0.5},
        {"affinity": 2},
        {"block": 0},
        {"default_threshold": 0},
        {"least_batch": -1},
    ):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            Limits(**setting)  # type: ignore[arg-type]


@given(
    groups=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=30),
    share=st.sampled_from([1 / 64, 0.2]),
)
@settings(max_examples=100, deadline=None)
def test_a_model_that_becomes_known_later_decides_alone(groups: list[tuple[int, int, int]], share: float) -> None:
    """The router in front of servers starts with a stand-in for the model it will serve."""
    stand_in = ModelCost.from_config({**SMALL_MOE, "hidden_size": 40 * SMALL_MOE["hidden_size"]})
    fronts = [
        RoutingPolicy(cost, BlockView(10**7, BLOCK), Limits(block=BLOCK, default_threshold=THOUSAND, await_share=share))
        for cost in (COST, stand_in)
    ]
    fronts[1].cost = COST
    sent: list[list[Dispatch]] = [[], []]
    for front, found in zip(fronts, sent, strict=True):
        for rank in range(2):
            front.rank_joined(rank)
        for number, (group, shared, tail) in enumerate(groups):
            found += run(front, request(f"r{number}", prompt(group, 16 * shared, number, tail)))
            if number % 3 == 2 and found:
                done(front, found[-1])
    assert [(d.rid, d.rank, d.reason, d.flops) for d in sent[0]] == [
        (d.rid, d.rank, d.reason, d.flops) for d in sent[1]
    ]
