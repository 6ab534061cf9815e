"""What is fetched and what is sent: the plan against brute force, every choice a partition, and what they do not do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep_sgl.experts.calls.choice import AtRandom, ByCost, Choice, LayerPlace, Routed, SendAll, Under
from asyncep_sgl.experts.calls.plan import (
    Coming,
    Prices,
    due,
    how_many_to_await,
    how_many_to_fetch,
    seconds_by_fetched,
)
from asyncep_sgl.experts.calls.popularity import Popularity

EXPERTS = 8
# Of one emulated core and its link, see docs/results: milliseconds an expert, microseconds a row.
SLOW = Prices(fetch=12e-3, expert=3e-4, row=6e-6, out=1e-5, back=1e-5, call=1e-3, copying=0.3)
FAST = Prices(fetch=1e-4, expert=3e-4, row=6e-6, out=1e-7, back=1e-7, call=1e-4)

seconds = st.floats(0, 1)
prices = st.builds(
    Prices,
    fetch=st.floats(1e-6, 1),
    expert=st.floats(0, 1e-2),
    row=st.floats(1e-9, 1e-3),
    out=st.floats(0, 1e-3),
    back=st.floats(0, 1e-3),
    call=st.floats(0, 1e-2),
    copying=st.floats(0, 1),
)
rows = st.lists(st.floats(0, 1e4), max_size=12).map(lambda found: sorted(found, reverse=True))


def place() -> LayerPlace:
    """Four experts here, four elsewhere."""
    own, missing = frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})
    return LayerPlace(EXPERTS, own, missing, {0: own, 1: missing})


def routed(counts: Sequence[int], *, tokens: int | None = None, before: float | None = 0.01) -> Routed:
    starts = [0, *itertools.accumulate(counts)]
    return Routed(0, tokens if tokens is not None else sum(counts), starts, before)


def by_cost(
    given_prices: Prices | None, busy: float = 0.0, *, first: bool = False, able: frozenset[int] = frozenset({1})
) -> ByCost:
    """Layer 0's choices; a layer before it has the batch's probe, unless ``first``."""
    layers = {0: place()} if first else {-1: place(), 0: place()}
    return ByCost(layers, lambda: busy, lambda: able, given_prices)


# --- the plan ---------------------------------------------------------------------------------------------------------


@given(rows, seconds, seconds, st.integers(1, 20_000), prices, st.floats(0, 1))
def test_what_is_fetched_is_nearly_the_fastest_and_is_everything_or_as_little_as_is_that_fast(
    expected: list[float], own: float, other: float, tokens: int, cost: Prices, busy: float
) -> None:
    given_alike = {"own": own, "other": other, "tokens": tokens, "prices": cost, "busy": busy}
    found = seconds_by_fetched(expected, **given_alike)
    assert len(found) == len(expected) + 1
    count = how_many_to_fetch(expected, **given_alike)
    assert found[count] <= min(found) * (1.1 if count == len(expected) else 1.03)
    assert count == len(expected) or found[-1] > min(found) * 1.1
    assert count == len(expected) or all(fewer > min(found) * 1.03 for fewer in found[:count])


@given(rows, seconds, seconds, st.integers(1, 20_000), prices, st.floats(0, 1), st.floats(1, 50))
def test_a_slower_link_or_a_busier_host_never_makes_a_layer_faster(
    expected: list[float], own: float, other: float, tokens: int, cost: Prices, busy: float, factor: float
) -> None:
    slower = cost.with_fetch(2 * cost.fetch, 1.0)
    assert slower.fetch == pytest.approx(2 * cost.fetch)
    assert slower.back == pytest.approx(2 * cost.back)
    base = seconds_by_fetched(expected, own=own, other=other, tokens=tokens, prices=cost, busy=busy)
    for changed, how in ((slower, busy), (cost, min(1.0, busy * factor))):
        found = seconds_by_fetched(expected, own=own, other=other, tokens=tokens, prices=changed, busy=how)
        assert all(new >= old * (1 - 1e-9) for new, old in zip(found, base, strict=True))


@pytest.mark.parametrize(
    ("tokens", "cost", "busy", "expected"),
    [
        (32, SLOW, 0.0, 0),  # a lone prompt: everything is sent
        (512, SLOW, 0.0, 0),
        (20_000, SLOW, 1.0, 16),  # saturation: the computation hides the whole gather
        (20_000, FAST, 1.0, 16),
        (32, FAST, 1.0, 16),
    ],
)
def test_little_work_sends_and_much_work_fetches(tokens: int, cost: Prices, busy: float, expected: int) -> None:
    each = tokens * 4 / 32
    found = how_many_to_fetch(
        [each] * 16, own=cost.work(16, 16 * each), other=16e-6 * tokens, tokens=tokens, prices=cost, busy=busy
    )
    assert found == expected


@given(
    st.lists(st.builds(Coming, st.floats(0, 1), st.integers(0, 4), st.integers(0, 1000)), max_size=4),
    seconds, st.integers(0, 9), st.integers(0, 5000), st.integers(1, 5000), prices, st.floats(0, 1),
)  # fmt: skip
def test_what_is_awaited_is_nearly_the_fastest(
    coming: list[Coming], here: float, away_experts: int, away_rows: int, tokens: int, cost: Prices, busy: float
) -> None:
    coming.sort(key=lambda part: part.due)
    count = how_many_to_await(
        coming,
        here=here,
        away_experts=away_experts,
        away_rows=away_rows,
        tokens=tokens,
        prices=cost,
        busy=busy,
    )

    def layer(awaited: int) -> float:
        clock = here
        for part in coming[:awaited]:
            clock = max(clock, part.due) + cost.work(part.experts, part.rows)
        rest = coming[awaited:]
        sent_rows = away_rows + sum(part.rows for part in rest)
        sent = cost.sent(away_experts + sum(part.experts for part in rest), sent_rows, tokens, busy)
        beside = min(sent_rows * cost.back, coming[-1].due) if rest and sent else 0.0
        return max(clock, sent + beside)

    by_count = [layer(awaited) for awaited in range(len(coming) + 1)]
    assert by_count[count] <= min(by_count) * 1.03 + 1e-12


@given(st.integers(0, 16), st.floats(1, 1e4), st.integers(1, 20_000), prices, st.floats(0, 1))
def test_pieces_are_as_many_as_are_fastest(experts: int, sent: float, tokens: int, cost: Prices, busy: float) -> None:
    pieces = cost.pieces(experts, sent, tokens, busy)
    assert 1 <= pieces <= 4
    out = min(sent, tokens) * cost.out
    work = (pieces * experts * cost.expert + sent * cost.row) * (1 + busy)
    assert cost.sent(experts, sent, tokens, busy) == pytest.approx(
        cost.call + out / pieces + max(work, sent * cost.back)
    )
    whole = (experts * cost.expert + sent * cost.row) * (1 + busy)
    assert cost.sent(experts, sent, tokens, busy) <= (cost.call + out + max(whole, sent * cost.back)) * (1 + 1e-9)


def test_a_slow_link_cuts_and_a_fast_one_does_not() -> None:
    assert SLOW.pieces(16, 8192, 4096, 0.0) == 4
    assert FAST.pieces(16, 8192, 4096, 0.0) == 1
    assert SLOW.pieces(16, 64, 32, 0.0) == 1


def test_parts_come_one_after_the_other() -> None:
    assert due([1, 2, 1], 0.5) == [0.5, 1.5, 2.0]
    assert due([], 0.5) == []


# --- the choices ------------------------------------------------------------------------------------------------------


@st.composite
def situations(draw: st.DrawFn) -> tuple[Routed, list[str]]:
    counts = draw(st.lists(st.integers(0, 500), min_size=EXPERTS, max_size=EXPERTS))
    states = draw(st.lists(st.sampled_from(["there", "coming", "failed"]), min_size=4, max_size=4))
    return routed(counts, before=draw(st.none() | st.floats(0, 0.1))), states


def under(experts: Sequence[int], state: str) -> Under:
    return Under(experts, state == "there", state == "coming")


@given(
    st.lists(situations(), min_size=1, max_size=6),
    st.sampled_from(["all", "cost", "alone", "unpriced", "random"]),
    prices,
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_every_row_is_computed_once_wherever(
    batches: list[tuple[Routed, list[str]]], kind: str, cost: Prices, busy: float, seed: int
) -> None:
    choices: dict[str, Choice] = {
        "all": SendAll({0: place()}),
        "cost": by_cost(cost, busy),
        "alone": by_cost(cost, busy, able=frozenset()),
        "unpriced": by_cost(None),
        "random": AtRandom({0: place()}, random.Random(seed)),
    }
    choice = choices[kind]
    for at, states in batches:
        wanted = list(choice.prefetch(0))
        assert len(set(wanted)) == len(wanted)
        assert set(wanted) <= place().missing
        parts = [under([expert], state) for expert, state in zip(wanted, states, strict=False)]
        decision = choice.decide(at, parts)
        assert len(decision.wait) == len(parts)
        kept = {expert for part, wait in zip(parts, decision.wait, strict=True) if wait for expert in part.experts}
        assert not kept & decision.send
        assert not kept & decision.fetch
        assert not decision.send & decision.fetch
        with_rows = {expert for expert in place().missing if at.rows(expert)}
        assert with_rows <= kept | decision.send | decision.fetch <= place().missing
        assert all(at.rows(expert) for expert in decision.send | decision.fetch)
        if kind != "unpriced":
            # What went wrong is not waited for: nobody knows when it comes.
            assert not any(
                wait for part, wait in zip(parts, decision.wait, strict=True) if part == under(part[0], "failed")
            )
        if kind == "alone":
            assert not decision.send


def test_where_nobody_may_be_asked_everything_is_fetched_ahead_and_waited_for() -> None:
    choice = by_cost(SLOW, able=frozenset())
    choice.decide(routed([16] * EXPERTS, tokens=32), [])
    assert set(choice.prefetch(0)) == place().missing
    decision = choice.decide(routed([16] * EXPERTS, tokens=32), [under([1, 3], "coming"), under([5], "failed")])
    assert decision == ((True, False), frozenset(), {5, 7})


def test_what_is_there_is_never_sent() -> None:
    choice = by_cost(SLOW)
    at = routed([10] * EXPERTS)
    decision = choice.decide(at, [Under([1, 3], True), Under([5], True)])
    assert decision.wait == (True, True)
    assert decision.send == {7}


def test_the_hottest_are_fetched_first_and_at_saturation_one_call_a_batch_is_left() -> None:
    for first in (True, False):
        choice = by_cost(SLOW, 1.0, first=first)
        counts = [6000, 1000, 6000, 9000, 6000, 4000, 6000, 7000]
        for layer in choice.layers:
            for _ in range(20):
                choice.decide(routed(counts, tokens=20_000, before=0.3)._replace(layer=layer), [])
        assert list(choice.prefetch(0)) == [3, 7, 5] + ([] if first else [1])


def test_a_host_that_is_busy_a_quarter_of_the_time_counts_as_busy() -> None:
    """Where ranks wait for each other's rows, none computes all the time."""
    found = []
    for busy in (0.0, 0.25, 1.0):
        choice = by_cost(FAST, busy)
        choice.decide(routed([1000] * EXPERTS, tokens=2000, before=0.001), [])
        found.append(len(choice.prefetch(0)))
    assert found[0] < found[1] == found[2] == 4


def test_a_small_batch_after_large_ones_fetches_nothing() -> None:
    choice = by_cost(SLOW)
    choice.decide(routed([5000] * EXPERTS, tokens=20_000, before=0.3), [])
    assert len(choice.prefetch(0)) == 4
    choice.decide(routed([16] * EXPERTS, tokens=32, before=0.001), [])
    assert list(choice.prefetch(0)) == []


def test_the_price_of_a_fetch_follows_the_link_and_no_moment_of_it() -> None:
    choice = by_cost(SLOW)
    choice.fetched(4, 1000.0)
    assert choice.prices is not None
    assert choice.prices.fetch == pytest.approx(1.1 * SLOW.fetch)
    for _ in range(400):
        choice.fetched(4, 4e-3)
    assert choice.prices.fetch == pytest.approx(1e-3, rel=0.01)
    assert choice.prices.back == pytest.approx(SLOW.back / 12, rel=0.01)
    assert (choice.prices.row, choice.prices.call) == (SLOW.row, SLOW.call)
    by_cost(None).fetched(4, 1.0)


@given(st.lists(st.lists(st.integers(0, 900), min_size=EXPERTS, max_size=EXPERTS), max_size=30))
def test_popularity_is_a_share_and_follows_what_comes(batches: list[list[int]]) -> None:
    popular = Popularity(EXPERTS)
    for counts in batches:
        popular.seen([0, *itertools.accumulate(counts)])
    shares = [popular.share(expert) for expert in range(EXPERTS)]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    assert popular.hottest(range(EXPERTS)) == sorted(range(EXPERTS), key=lambda expert: (-shares[expert], expert))
    for _ in range(200):
        popular.seen([0, 0, 0, 900, *[900] * (EXPERTS - 3)])
    assert popular.hottest(range(EXPERTS))[0] == 2
    assert popular.share(2) > 0.99
