"""What a run cost against the bounds, on examples worked out by hand, and against the simulator's own books."""

from __future__ import annotations

from array import array

import pytest
from small_moe import COST

from asyncep.sim.redundancy import Redundancy
from asyncep.sim.workloads import TimedPrompt, few_shot_mix

PAGE = 16


def prompt(*parts: tuple[int, int]) -> TimedPrompt:
    """Parts of (token id, how many of it)."""
    return TimedPrompt(0.0, array("q", [token for token, count in parts for _ in range(count)]))


def test_what_each_prompt_shares() -> None:
    prompts = [prompt((1, 40), (2, 30)), prompt((1, 40), (3, 30)), prompt((4, 70)), prompt((1, 32))]
    # Whole pages of 16 of the first 40; of the last prompt all but the page with its last token.
    assert Redundancy(prompts, PAGE, COST).shared == [32, 32, 0, 16]


def test_bounds_and_ratios_of_two_prompts() -> None:
    prompts = [prompt((1, 48), (2, 10)), prompt((1, 48), (3, 10))]
    bounds = Redundancy(prompts, PAGE, COST)
    once = COST.flops(48, 0, logits=0)
    assert bounds.prefix_bound == once
    assert bounds.bound == COST.flops(58, 0) + COST.flops(10, 48)

    twice = bounds.judge([0, 0], ["a", "b"], 2)
    assert twice.prefix_ratio == 2
    assert twice.flops_ratio == 2 * COST.flops(58) / bounds.bound
    assert (twice.cached_share, twice.imbalance) == (0, 1)

    best = bounds.judge([0, 48], ["a", "a"], 2)
    assert (best.prefix_ratio, best.flops_ratio, best.imbalance) == (1, 1, 2)
    assert best.cached_share == 48 / 116

    part = bounds.judge([0, 32], ["a", "b"], 2)
    assert part.prefix_ratio == (once + COST.flops(16, 32, logits=0)) / once


def test_nothing_shared_has_no_prefix_ratio() -> None:
    found = Redundancy([prompt((1, 20)), prompt((2, 20))], PAGE, COST).judge([0, 0], [0, 1], 2)
    assert found.prefix_ratio != found.prefix_ratio
    assert found.flops_ratio == 1


def test_an_endless_cache_in_order_meets_both_bounds() -> None:
    prompts = few_shot_mix(60, seed=3, tasks=5, prefix_tokens=(100, 300), suffix_tokens=(5, 40))
    bounds = Redundancy(prompts, PAGE, COST)
    seen: set[int] = set()
    cached = []
    for each, shared in zip(prompts, bounds.shared, strict=True):
        cached.append(shared if each.group in seen else 0)
        seen.add(each.group)
    found = bounds.judge(cached, [0] * 60, 1)
    assert found.prefix_ratio == pytest.approx(1)
    assert found.flops_ratio == pytest.approx(1)


def test_every_request_is_wanted() -> None:
    with pytest.raises(ValueError, match="zip"):
        Redundancy([prompt((1, 20)), prompt((2, 20))], PAGE, COST).judge([0], [0], 1)
