"""A rank's next batch begins with what the router wants first, and nothing waits for ever."""

from __future__ import annotations

import time
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from asyncep_sgl.router.rank_order import MOST_SECONDS, is_bulk, sort_waiting, urgency


def waiting(order: int | None, seconds: float) -> SimpleNamespace:
    """As much of SGLang's ``Req`` as is looked at."""
    stats = SimpleNamespace(wait_queue_entry_time=time.perf_counter() - seconds)
    return SimpleNamespace(priority=order, time_stats=stats)


@given(st.lists(st.tuples(st.integers(-10, 10), st.booleans()), max_size=12))
def test_high_priorities_first_and_of_each_quick_before_bulk(requests: list[tuple[int, bool]]) -> None:
    queue = [waiting(urgency(priority, bulk), 1) for priority, bulk in requests]
    expected = sorted(range(len(queue)), key=lambda i: (-requests[i][0], requests[i][1]))  # stable
    sorted_queue = [queue[i] for i in expected]
    sort_waiting(queue)
    assert queue == sorted_queue
    assert [is_bulk(req.priority) for req in queue] == [requests[i][1] for i in expected]


@given(st.lists(st.tuples(st.sampled_from([None, -3, -1, 0, 2]), st.booleans()), max_size=12))
def test_nothing_is_passed_any_more_once_it_has_waited_long(requests: list[tuple[int | None, bool]]) -> None:
    queue = [waiting(order, MOST_SECONDS + 5 if old else 1) for order, old in requests]
    olds = {id(req) for req, (_, old) in zip(queue, requests, strict=True) if old}
    mixed = len({req.priority for req in queue}) > 1
    sort_waiting(queue)
    if mixed:
        assert {id(req) for req in queue[: len(olds)]} == olds


def test_what_the_router_did_not_send_is_in_no_bulk() -> None:
    assert not is_bulk(None)
    queue = [waiting(urgency(0, bulk=True), 1), waiting(None, 1)]
    sort_waiting(queue)
    assert queue[0].priority is None
