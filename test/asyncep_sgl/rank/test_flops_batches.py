"""What a batch's FLOPs target means in tokens, and that SGLang's admission keeps to it.

In a server: test_on_disk.py.
"""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_adders import PLAIN, batches, request
from small_moe import COST

from asyncep_sgl.rank.flops_batches import adder_class


@given(budget=st.floats(0, 1e13), cached=st.integers(0, 100_000))
def test_the_most_tokens_that_fit(budget: float, cached: int) -> None:
    tokens = COST.tokens_within(budget, cached)
    assert tokens == 0 or COST.flops(tokens, cached) <= budget
    assert COST.flops(tokens + 1, cached) > budget


@patch("sglang.srt.managers.schedule_policy.get_exec", lambda: PLAIN)
@patch("sglang.srt.managers.schedule_policy.get_schedule", lambda: PLAIN)
@settings(max_examples=50, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 1500), st.integers(0, 100).map(lambda n: n * 16)), min_size=1, max_size=6
    ),
    target=st.integers(96, 2048).map(COST.flops),
    page=st.sampled_from([1, 16]),
)
def test_every_batch_is_cut_at_the_target(prompts: list[tuple[int, int]], target: float, page: int) -> None:
    """Whatever meets in one batch, ends of prompts after long prefixes included."""
    waiting = [request(tokens, cached) for tokens, cached in prompts]
    found = batches(waiting, adder_class(COST, lambda: target), page)
    assert sum(new for batch in found for new, _ in batch) == sum(tokens for tokens, _ in prompts)
    ends_after = {id(batch): {cached + new for new, cached in batch} for batch in found}
    one_page = 2 * COST.flops(page, 3200)
    for number, batch in enumerate(found):
        costs = [COST.flops(new, cached) for new, cached in batch]
        # A page is the least that can be computed of a prompt, whatever it costs.
        assert sum(costs) < 2 * target or batch[-1][0] <= page
        assert sum(costs[:-1]) < target
        # Nor is it closed early while there is work that would have fitted: it holds the target, a cut one too.
        if number < len(found) - 1:
            assert sum(costs) >= target - one_page
            # What is left of a cut prompt is a batch's worth as well.
            following, cached = found[number + 1][0]
            if cached in ends_after[id(batch)] - {cached for _, cached in prompts}:
                assert COST.flops(following, cached) >= target - one_page
