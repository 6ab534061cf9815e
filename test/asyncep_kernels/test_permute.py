"""Permutation kernels against their reference, over every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreter

from asyncep_kernels.permute import cpu, reference

IMPLEMENTATIONS = ["cpu", "triton"]


def run(implementation: str, function: str, *args: Any, **kwargs: Any) -> Any:
    if implementation == "cpu":
        return getattr(cpu, function)(*args, **kwargs)
    return interpreter().call("asyncep_kernels.permute.triton", function, *args, **kwargs)


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, torch.Tensor | None]:
    experts = draw(st.sampled_from([1, 3, 16, 33]))
    # Up to three chunks, the last one ragged; 0 tokens too.
    tokens, top_k = draw(st.one_of(st.integers(0, 20), st.sampled_from([64, 127]))), draw(st.integers(1, 3))
    among = draw(st.lists(st.integers(-1, experts - 1), min_size=1, max_size=40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.tensor(among)[torch.randint(len(among), (tokens, top_k), generator=generator)]
    ids = ids.to(draw(st.sampled_from([torch.int32, torch.int64])))
    order = torch.randperm(experts, generator=generator).int() if draw(st.booleans()) else None
    return ids, experts, draw(st.sampled_from([1, 16, 64])), order


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(routings())
def test_every_assignment_has_its_place(implementation: str, routing: tuple[Any, ...]) -> None:
    ids, experts, block, order = routing
    found = run(implementation, "permute", ids, experts, block, order=order)
    for mine, exact in zip(found, reference.permute(ids, experts, block, order=order), strict=True):
        assert mine.dtype == exact.dtype
        assert torch.equal(mine, exact)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_more_chunks_than_one_scan_takes(implementation: str) -> None:
    ids = torch.randint(-1, 20, (1500, 3), generator=torch.Generator().manual_seed(4))
    found = run(implementation, "permute", ids, 20, 128)
    for mine, exact in zip(found, reference.permute(ids, 20, 128), strict=True):
        assert torch.equal(mine, exact)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
def test_ids_of_no_expert_are_ignored(implementation: str) -> None:
    ids = torch.tensor([[0, 5], [-1, 2], [7, -3]])
    module = reference.permute if implementation == "reference" else None
    found = module(ids, 3, 2) if module else run(implementation, "permute", ids, 3, 2)
    assert found.counts.tolist() == [1, 0, 1]
    assert found.position.tolist() == [[0, -1], [-1, 2], [-1, -1]]
    assert found.block_expert.tolist()[:2] == [0, 2]
    assert set(found.block_expert.tolist()[2:]) <= {-1}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.sampled_from([1, 24, 1030]), st.booleans(), st.integers(0, 2**31))
def test_rows_are_summed_back(implementation: str, tokens: int, top_k: int, width: int, half: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if half else torch.float32
    rows = torch.randn(tokens * top_k + 3, width, generator=generator).to(dtype)
    rows[-3:] = float("nan")  # padding, which no position names
    position = torch.randperm(tokens * top_k, generator=generator).int().view(tokens, top_k)
    position[torch.rand(tokens, top_k, generator=generator) < 0.2] = -1
    weights = torch.rand(tokens, top_k, generator=generator)
    found = run(implementation, "unpermute", rows, position, weights)
    exact = reference.unpermute(rows.float(), position, weights)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, rtol=2**-8 if half else 1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_errors_name_what_does_not_fit(implementation: str) -> None:
    with pytest.raises(ValueError, match=r"want \(T, K\)"):
        run(implementation, "permute", torch.zeros(3), 2, 16)
    with pytest.raises(ValueError, match=r"order \(3,\): want \(2,\)"):
        run(implementation, "permute", torch.zeros(3, 1), 2, 16, order=torch.arange(3))
    with pytest.raises(ValueError, match="position"):
        run(implementation, "unpermute", torch.zeros(3, 4), torch.zeros(2, 2), torch.zeros(2, 1))
