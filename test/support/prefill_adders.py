"""SGLang's scheduler reduced to forming prefill batches, around a class of adders under test."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

MEMORY_TOKENS = 1_000_000

# What the admission asks SGLang's configuration, which only a server publishes.
PLAIN = SimpleNamespace(features=SimpleNamespace(enable_encoder_swa_bounded_replay=False), schedule_policy="fcfs")


class Request(MagicMock):
    """As much of SGLang's request as its admission looks at."""

    @property
    def extend_len(self) -> int:
        return int(self.extend_end - self.prefix_len)


def request(tokens: int, cached: int, priority: int | None = None) -> Request:
    """Of new and cached tokens."""
    found = Request()
    found.priority = priority
    found.sampling_params = SimpleNamespace(ignore_eos=False, max_new_tokens=0)
    found.full_untruncated_fill_ids = range(tokens + cached)
    found.prefix_len, found.extend_end, found.output_ids = cached, cached, []
    found.host_hit_length = found.swa_host_hit_length = found.auxiliary_swa_host_hit_length = 0
    found.needs_host_load_back.return_value = False
    found.retracted_stain = True  # the cache's own statistics are not kept here
    return found


def batches(waiting: list[Request], chosen: type[PrefillAdder], page: int) -> list[list[tuple[int, int]]]:
    """(New tokens, cached tokens) of each request of each batch, by SGLang's own order."""
    tree = MagicMock(disable=False)
    tree.supports_mamba.return_value = tree.supports_prefix_sharing.return_value = False
    tree.evictable_size.return_value = 0
    allocator = MagicMock(page_size=page)
    allocator.available_size.return_value = MEMORY_TOKENS
    allocator.request_slot_reserve.return_value = 0
    allocator.create_prefill_budget = lambda cache, num_mixed_decode_tokens: PrefillBudget(allocator, cache)
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
