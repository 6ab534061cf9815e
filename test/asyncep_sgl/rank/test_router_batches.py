"""Batches are no larger than the router's, and smaller where a quick request waits for all of them."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_adders import PLAIN, batches, request
from sglang.srt.managers.schedule_policy import PrefillAdder
from small_moe import COST

from asyncep_sgl.rank.router_batches import bounded, share_of_batch
from asyncep_sgl.router.rank_order import urgency

CHUNK_TOKENS = 16384


@patch("sglang.srt.managers.schedule_policy.get_exec", lambda: PLAIN)
@patch("sglang.srt.managers.schedule_policy.get_schedule", lambda: PLAIN)
@settings(max_examples=60, deadline=None)
@given(
    quick=st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 50).map(lambda n: n * 16)), max_size=8),
    bulk=st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 50).map(lambda n: n * 16)), max_size=12),
    tokens=st.sampled_from([256, 2048, 4096]),
)
def test_a_batch_closes_in_time_and_not_early(
    quick: list[tuple[int, int]], bulk: list[tuple[int, int]], tokens: int
) -> None:
    waiting = [request(*each, urgency(0, bulk=False)) for each in quick]
    waiting += [request(*each, urgency(0, bulk=True)) for each in bulk]
    found = batches(waiting, bounded(COST, tokens)(PrefillAdder), 1)
    share = share_of_batch(COST, tokens)
    everything = [*quick, *bulk]
    assert [each for batch in found for each in batch] == everything, "all, whole, in order"
    done = 0
    for batch in found:
        first_bulk = max(0, len(quick) - done)  # in this batch
        shares = [share(*each) for each in batch]
        done += len(batch)
        mixed = 0 < first_bulk < len(batch)
        assert len(batch) == 1 or sum(shares) <= (0.5 if mixed else 1) + 1e-9
        if done < len(everything):
            joins_quick = first_bulk > 0 and done >= len(quick)
            following = share(*everything[done])
            assert sum(shares) + following > (0.5 if joins_quick else 1) - 1e-9
            assert sum(new for new, _ in batch) < CHUNK_TOKENS


@patch("sglang.srt.managers.schedule_policy.get_exec", lambda: PLAIN)
@patch("sglang.srt.managers.schedule_policy.get_schedule", lambda: PLAIN)
def test_a_quick_request_behind_bulk_that_has_waited_long_keeps_its_batch_small_too() -> None:
    waiting = [request(100, 0, urgency(0, bulk=bulk)) for bulk in (True, False, *[True] * 20)]
    found = batches(waiting, bounded(COST, 1000)(PrefillAdder), 1)
    assert [len(batch) for batch in found] == [5, 10, 7]
