"""Plans, held against brute force: every prompt once, every shared prefix once a rank, every batch at T or excused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep.client.plan import Batch, Plan, Shape, TokenCost, plan

PAGE = 2
Prompt = list[int]

# Few tokens and few beginnings, so that prefixes are shared at many depths and prompts repeat.
beginnings = st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=4)
endings = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@st.composite
def prompt_lists(draw: st.DrawFn) -> list[Prompt]:
    heads = draw(beginnings)
    return [draw(st.sampled_from(heads)) + draw(endings) for _ in range(draw(st.integers(0, 40)))]


shapes = st.builds(
    Shape,
    ranks=st.integers(1, 3),
    threshold=st.integers(1, 40),
    page=st.just(PAGE),
    distance=st.integers(1, 3),
    worth=st.just(1),
    most_rows=st.integers(1, 20),
)


def shared(left: Prompt, right: Prompt) -> int:
    """Whole pages of a common prefix."""
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return same // PAGE * PAGE


def computed(lane: tuple[Batch, ...], prompts: list[Prompt]) -> int:
    """Tokens a rank computes if a batch sees only the prefixes of the batches that it waits for and those before them.

    The last token of a prompt is always computed.
    """
    total = 0
    for batch in lane:
        before = [
            prompts[row] for earlier in lane[: (-1 if batch.after is None else batch.after) + 1] for row in earlier.rows
        ]
        for row in batch.rows:
            prompt = prompts[row]
            usable = (len(prompt) - 1) // PAGE * PAGE
            total += len(prompt) - min(usable, max((shared(prompt, other) for other in before), default=0))
    return total


def least(prompts: list[Prompt]) -> int:
    """Tokens if every page of a prefix is computed once, and every prompt's tokens that do not fill one."""
    pages = {tuple(prompt[:end]) for prompt in prompts for end in range(PAGE, len(prompt) + 1, PAGE)}
    return PAGE * len(pages) + sum(len(prompt) % PAGE for prompt in prompts)


@given(prompt_lists(), shapes)
def test_every_distinct_prompt_is_computed_once(prompts: list[Prompt], shape: Shape) -> None:
    made = plan(prompts, TokenCost(), shape)
    rows = [row for lane in made.lanes for batch in lane for row in batch.rows]
    assert len(made.lanes) == shape.ranks
    assert sorted(rows) == sorted({tuple(p): i for i, p in reversed(list(enumerate(prompts)))}.values())
    for number, first in enumerate(made.same_as):
        assert prompts[first] == prompts[number]
        assert first in rows


@given(prompt_lists(), shapes)
def test_every_shared_prefix_is_computed_once_a_rank(prompts: list[Prompt], shape: Shape) -> None:
    made = plan(prompts, TokenCost(), shape)
    for lane in made.lanes:
        mine = [prompts[row] for batch in lane for row in batch.rows]
        assert computed(lane, prompts) <= least(mine)
        assert sum(batch.flops for batch in lane) == least(mine)


@given(prompt_lists(), shapes)
def test_batches_reach_the_threshold_unless_they_had_to_wait(prompts: list[Prompt], shape: Shape) -> None:
    for lane in plan(prompts, TokenCost(), shape).lanes:
        for number, batch in enumerate(lane):
            assert batch.rows
            assert batch.after is None or batch.after < number
            if batch.flops >= shape.threshold or len(batch.rows) >= shape.most_rows or number == len(lane) - 1:
                continue
            # Too small: then all that is left depends on what is in this batch.
            assert lane[number + 1].after == number


@given(st.integers(2, 60), st.integers(1, 3))
def test_company_comes_a_distance_after_its_lead_where_there_is_other_work(groups: int, distance: int) -> None:
    prompts = [[group, *[7] * 11, row] for group in range(groups) for row in range(6)]
    shape = Shape(1, 26, PAGE, distance=distance, worth=1)
    [lane] = plan(prompts, TokenCost(), shape).lanes
    close = sum(1 for number, batch in enumerate(lane) if batch.after is not None and number - batch.after < distance)
    # Only near the end is there nothing to fill the time with.
    assert close <= distance


def test_lanes_cost_the_same() -> None:
    prompts = [[group, *range(100), row] for group in range(16) for row in range(25)]
    costs = [sum(batch.flops for batch in lane) for lane in plan(prompts, TokenCost(), Shape(4, 100, worth=8)).lanes]
    assert max(costs) <= 1.1 * min(costs)


def test_what_ranks_hold_is_neither_computed_nor_waited_for() -> None:
    shots = list(range(64))
    prompts = [[*shots, 100 + row] for row in range(20)]
    shape = Shape(2, 5, page=16)
    fresh, warm = plan(prompts, TokenCost(), shape), plan(prompts, TokenCost(), shape, held=[shots])
    assert fresh.lanes[0][0].rows == (0,)
    assert fresh.flops == 2 * 64 + 20
    assert warm.flops == 20
    assert all(batch.after is None for lane in warm.lanes for batch in lane)
    assert warm.possible_cached == 20 * 64


def test_little_in_common_is_no_reason_to_wait() -> None:
    prompts = [[7] * 32 + [row] * 40 for row in range(10)]
    [lane] = plan(prompts, TokenCost(), Shape(1, 10_000, page=16, worth=64)).lanes
    assert [batch.after for batch in lane] == [None]


@pytest.mark.parametrize("broken", [{"ranks": 0}, {"threshold": 0}, {"page": 0}, {"distance": 0}])
def test_shapes_that_cannot_be(broken: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan([[1]], TokenCost(), Shape(**{"ranks": 1, "threshold": 1, **broken}))


def test_an_empty_prompt_is_refused_and_no_prompts_are_fine() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        plan([[1], []], TokenCost(), Shape(1, 1))
    assert plan([], TokenCost(), Shape(2, 1)) == Plan(((), ()), (), 0)
