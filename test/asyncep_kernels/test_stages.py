"""The stages of ``moe`` apart: whatever runs the experts are cut into, wherever they are computed, the bits are one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep_kernels.moe import cpu, cpu_native, reference
from asyncep_kernels.moe.stages import Sorted
from asyncep_kernels.moe.table import ExpertTable

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertTable]
NATIVE = "native"
TORCH = "torch"


@pytest.fixture(params=[NATIVE, TORCH])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In C where this machine can, and by torch's operators."""
    if request.param == NATIVE and cpu_native.library() is None:
        pytest.skip("no C kernels for this CPU")
    if request.param == TORCH:
        monkeypatch.setattr(cpu_native, "serves", lambda hidden, experts: False)
        monkeypatch.setattr(cpu, "library", lambda: None)
    return str(request.param)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    experts, top_k = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    # More than a block of rows for an expert, and few.
    tokens = draw(st.one_of(st.integers(1, 40), st.integers(500, 700)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    w13 = torch.randn(experts, 2 * 32, 64, generator=generator) / 8
    w2 = torch.randn(experts, 64, 32, generator=generator) / 6
    hidden = torch.randn(tokens, 64, generator=generator)
    return hidden.to(dtype), ids, weights, ExpertTable(w13.to(dtype), w2.to(dtype))


def cuts(draw_from: list[int], experts: int) -> list[tuple[int, int]]:
    """Runs of experts that cover all of them."""
    bounds = sorted({0, experts, *(cut % (experts + 1) for cut in draw_from)})
    return list(itertools.pairwise(bounds))


@pytest.mark.usefixtures("where")
@given(batch=batches(), chosen=st.lists(st.integers(0, 9), max_size=4), data=st.data())
@settings(max_examples=60)
def test_runs_in_any_order_are_the_whole(batch: Batch, chosen: list[int], data: st.DataObject) -> None:
    hidden, ids, weights, experts = batch
    whole = cpu.moe(hidden, ids, weights, experts)
    order = cpu.sort(ids, len(experts.w13))
    results = torch.full((ids.numel(), hidden.shape[1]), float("nan"), dtype=hidden.dtype)
    for first, last in data.draw(st.permutations(cuts(chosen, len(experts.w13)))):
        cpu.run(hidden, order, experts, results, first=first, last=last)
    assert torch.equal(cpu.combine(results, order.place, weights, dtype=hidden.dtype), whole)
    exact = reference.moe(hidden.float(), ids, weights, ExpertTable(experts.w13.float(), experts.w2.float()))
    assert (whole.float() - exact).abs().max() <= (1e-4 if hidden.dtype == torch.float32 else 0.05) * max(
        1.0, exact.abs().max().item()
    )


@pytest.mark.usefixtures("where")
@given(batch=batches(), cut=st.integers(0, 9))
@settings(max_examples=40)
def test_rows_that_travel_come_back_the_same(batch: Batch, cut: int) -> None:
    """Their owner computes some experts on the rows alone, without the tokens they are of."""
    hidden, ids, weights, experts = batch
    count = len(experts.w13)
    first = cut % (count + 1)
    order = cpu.sort(ids, count)
    results = torch.zeros((ids.numel(), hidden.shape[1]), dtype=hidden.dtype)
    cpu.run(hidden, order, experts, results, last=first)
    # What is sent: the rows of the other experts, in order, and where each expert's begin.
    sent = order.rows(first, count)
    rows = hidden[order.tokens[sent].long()]
    starts = (order.starts - order.starts[first]).clamp(min=0)
    away = torch.zeros_like(rows)
    arrived = Sorted(starts, order.tokens, order.place).arrived(len(rows))
    cpu.run(rows, arrived, experts, away, first=first)
    results[sent] = away
    whole = cpu.moe(hidden, ids, weights, experts)
    assert torch.equal(cpu.combine(results, order.place, weights, dtype=hidden.dtype), whole)


@pytest.mark.usefixtures("where")
@given(batch=batches())
@settings(max_examples=40)
def test_the_order_is_by_expert_and_then_by_token(batch: Batch) -> None:
    _, ids, _, experts = batch
    count = len(experts.w13)
    order = cpu.sort(ids, count)
    kept = [(expert, token) for token, row in enumerate(ids.tolist()) for expert in row if expert >= 0]
    found = [
        (expert, token) for expert in range(count) for token in order.tokens[order.rows(expert, expert + 1)].tolist()
    ]
    assert found == sorted(kept)
    assert order.starts[-1] == len(kept)
    for token, (row, places) in enumerate(zip(ids.tolist(), order.place.tolist(), strict=True)):
        for expert, place in zip(row, places, strict=True):
            assert (place == -1) == (expert < 0)
            assert place == -1 or order.tokens[place] == token
            assert place == -1 or order.starts[expert] <= place < order.starts[expert + 1]


@pytest.mark.usefixtures("where")
def test_an_expert_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="expert id 4, but there are 4 experts"):
        cpu.sort(torch.tensor([[0, 4]]), 4)
