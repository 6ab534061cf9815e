"""What the router inside the engine may give a rank."""

from __future__ import annotations

import pytest
from small_moe import COST

from asyncep_sgl.router.limits import SPREAD_TOKENS, limits_of


@pytest.mark.parametrize(
    ("gathers", "on_gpu", "saturating", "batch"),
    [
        (False, False, SPREAD_TOKENS, 2048),  # all experts in the host's memory
        (True, False, 2048, 2048),
        (False, True, SPREAD_TOKENS, 8192),  # one GPU that holds all experts
        (True, True, 2048, 2048),  # T, once measured, says more
    ],
)
def test_limits(gathers: bool, on_gpu: bool, saturating: int, batch: int) -> None:
    limits = limits_of(
        COST, tokens=2048, max_wait=0.5, gathers=gathers, on_gpu=on_gpu, chunk_tokens=8192, ranks_let_pass=on_gpu
    )
    assert limits.ranks_let_pass == on_gpu
    assert limits.default_threshold == COST.flops(saturating)
    assert limits.least_batch == COST.flops(batch)
    assert limits.max_wait == 0.5
    # Two batches of short prompts, except where FLOPs have to hide gathers.
    assert limits.most_requests == (float("inf") if gathers else 2 * batch // 16)


def test_a_batch_of_less_than_the_usual_t_is_taken_at_its_word() -> None:
    limits = limits_of(
        COST, tokens=100, max_wait=0, gathers=False, on_gpu=False, chunk_tokens=8192, ranks_let_pass=True
    )
    assert limits.default_threshold == limits.least_batch == COST.flops(100)
