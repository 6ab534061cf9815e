"""The paper's mix has the paper's requests and tokens, and shares what it says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep.sim.paper_mix import (
    DATASETS,
    LONGEST,
    REQUESTS,
    SYNTHETIC_TOKENS,
    TOKENS,
    Dataset,
    real_mix,
    scaled,
    synthetic,
    with_arrivals,
)
from asyncep_router.errors import ConfigError


def test_the_data_sets_make_up_the_papers_requests() -> None:
    assert sum(data.requests for data in DATASETS) == REQUESTS
    assert [data.name for data in DATASETS if data.fills] == ["arxiv-classification"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_tenth_has_a_tenth_of_the_tokens(seed: int) -> None:
    prompts = real_mix(seed=seed, scale=0.1)
    assert len(prompts) == REQUESTS // 10
    assert sum(len(prompt.token_ids) for prompt in prompts) == pytest.approx(TOKENS / 10, rel=0.01)
    assert max(len(prompt.token_ids) for prompt in prompts) <= 2 * LONGEST


def test_groups_share_their_prefix_and_only_that() -> None:
    seen: dict[int, bytes] = {}
    for prompt in real_mix(seed=5, scale=0.01):
        head = prompt.token_ids[: prompt.shared].tobytes()
        assert seen.setdefault(prompt.group, head) == head
        assert len(prompt.token_ids) > prompt.shared > 0
    assert len(seen) > len(DATASETS) - 1


def test_the_same_seed_gives_the_same_prompts() -> None:
    first, second = (real_mix(seed=9, scale=0.002, rate=10) for _ in range(2))
    assert first == second
    assert first != real_mix(seed=10, scale=0.002, rate=10)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 2), st.integers(0, 100))
def test_lengths_scale(scale: float, seed: int) -> None:
    data = (Dataset("x", 50, 2, 100, 50, own_spread=0),)
    for prompt in real_mix(seed=seed, length_scale=scale, datasets=data):
        assert prompt.shared == max(1, round(100 * scale))
        assert len(prompt.token_ids) == prompt.shared + max(1, round(50 * scale))


@pytest.mark.parametrize("name", SYNTHETIC_TOKENS)
def test_synthetic_lengths(name: str) -> None:
    prompts = synthetic(name, 3, seed=1)
    assert [len(prompt.token_ids) for prompt in prompts] == [SYNTHETIC_TOKENS[name]] * 3
    assert {prompt.shared for prompt in prompts} == {0}
    assert len({prompt.token_ids.tobytes() for prompt in prompts}) == 3


def test_arrivals() -> None:
    prompts = synthetic("short", 500, seed=1)
    assert {prompt.arrival for prompt in prompts} == {0.0}
    poisson = with_arrivals(prompts, seed=2, rate=10.0)
    assert [prompt.token_ids for prompt in poisson] == [prompt.token_ids for prompt in prompts]
    assert poisson[-1].arrival == pytest.approx(50, rel=0.2)
    halved = scaled(poisson, length_scale=0.5, speed=2)
    assert len(halved[0].token_ids) == 256
    assert halved[-1].arrival == poisson[-1].arrival / 2


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: real_mix(seed=1, scale=0), "scale"),
        (lambda: real_mix(seed=1, scale=0.001, length_scale=-1), "length_scale"),
        (lambda: real_mix(seed=1, scale=0.001, rate=0), "rate"),
        (lambda: synthetic("tiny", 1, seed=1), "tiny"),
        (lambda: scaled([], speed=0), "speed"),
    ],
)
def test_wrong_settings_name_themselves(call, field) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=field):
        call()
