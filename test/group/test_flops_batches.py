"""What a batch's FLOPs target means in tokens, and that SGLang's admission keeps to it.

In a server: test_on_disk.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock, patch

from hypothesis import given, settings
from hypothesis import strategies as st
from small_moe import COST
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from asyncep_sgl.scheduling.flops_batches import adder_class, tokens_within

MEMORY_TOKENS = 1_000_000


@given(budget=st.floats(0, 1e13), cached=st.integers(0, 100_000))
def test_the_most_tokens_that_fit(budget: float, cached: int) -> None:
    tokens = tokens_within(COST, budget, cached)
    assert tokens == 0 or COST.flops(tokens, cached) <= budget
    assert COST.flops(tokens + 1, cached) > budget


class Request(MagicMock):
    """As much of SGLang's request as its admission looks at."""

    @property
    def extend_len(self) -> int:
        return int(self.extend_end - self.prefix_len)


def request(tokens: int, cached: int) -> Request:
    found = Request()
    found.sampling_params = SimpleNamespace(ignore_eos=False, max_new_tokens=0)
    found.full_untruncated_fill_ids = range(tokens + cached)
    found.prefix_len, found.extend_end, found.output_ids = cached, cached, []
    found.host_hit_length = found.swa_host_hit_length = found.auxiliary_swa_host_hit_length = 0
    found.needs_host_load_back.return_value = False
    found.retracted_stain = True  # the cache's own statistics are not kept here
    return found


def batches(waiting: list[Request], target: float, page: int) -> list[list[tuple[int, int]]]:
    """SGLang's scheduler reduced to forming batches: (new tokens, cached tokens) of each request of each."""
    tree = MagicMock(disable=False)
    tree.supports_mamba.return_value = tree.supports_prefix_sharing.return_value = False
    tree.evictable_size.return_value = 0
    allocator = MagicMock(page_size=page)
    allocator.available_size.return_value = MEMORY_TOKENS
    allocator.request_slot_reserve.return_value = 0
    allocator.create_prefill_budget = lambda cache, num_mixed_decode_tokens: PrefillBudget(allocator, cache)
    chosen = adder_class(COST, lambda: target)
    found = []
    unfinished: Request | None = None
    while waiting or unfinished is not None:
        adder = chosen(page, tree, allocator, None, 1.0, MEMORY_TOKENS, 16384)
        if unfinished is not None:
            unfinished = adder.add_chunked_req(unfinished)
        for candidate in waiting:
            if (
                adder.budget_state() is not AddReqResult.CONTINUE
                or adder.add_one_req(candidate, unfinished is not None, None) is not AddReqResult.CONTINUE
            ):
                break
        waiting = [r for r in waiting if not any(r is other for other in adder.can_run_list)]
        assert unfinished is None or adder.new_chunked_req is None  # SGLang keeps track of one
        unfinished = adder.new_chunked_req or unfinished
        found.append([(r.extend_end - r.prefix_len, r.prefix_len) for r in adder.can_run_list])
        for r in adder.can_run_list:
            r.prefix_len = r.extend_end
    return found


# What the admission asks SGLang's configuration, which only a server publishes.
PLAIN = SimpleNamespace(features=SimpleNamespace(enable_encoder_swa_bounded_replay=False), schedule_policy="fcfs")


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
    found = batches([request(tokens, cached) for tokens, cached in prompts], target, page)
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
