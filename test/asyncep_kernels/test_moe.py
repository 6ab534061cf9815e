"""The MoE kernels against their fp32 reference, on every routing a batch may bring, over every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreter

from asyncep_kernels.moe import cpu, reference
from asyncep_kernels.moe.quant import Format, quantize_weight
from asyncep_kernels.moe.ready import make_ready
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.workspace import Workspace

# Largest error over largest output; see the implementations.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
IMPLEMENTATIONS = ["cpu", "triton"]
# Weights' format and whether activations are quantised.
QUANTISED = [(form, activations) for form in (Format.FP8, Format.INT8) for activations in (True, False)]


def moe(implementation: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    if implementation == "triton":
        found: torch.Tensor = interpreter().call("asyncep_kernels.moe.triton", "moe", *args, **kwargs)
        return found
    return (cpu if implementation == "cpu" else reference).moe(*args, **kwargs)


def layer(experts: int, hidden: int, inter: int, dtype: torch.dtype, seed: int = 0) -> ExpertTable:
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(experts, 2 * inter, hidden, generator=generator) / hidden**0.5
    w2 = torch.randn(experts, hidden, inter, generator=generator) / inter**0.5
    return ExpertTable(w13.to(dtype), w2.to(dtype))


def quantised(table: ExpertTable, form: Format) -> ExpertTable:
    w13, w2 = table.entries()
    first = [quantize_weight(weight, form, parts=2) for weight in w13]
    second = [quantize_weight(weight, form) for weight in w2]
    return ExpertTable(
        [numbers for numbers, _ in first],
        [numbers for numbers, _ in second],
        [scale for _, scale in first],
        [scale for _, scale in second],
    )


def in_fp32(table: ExpertTable) -> ExpertTable:
    return ExpertTable([w.float() for w in table.w13], [w.float() for w in table.w2])


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error over largest output."""
    assert found.shape == exact.shape
    assert found.isfinite().all()
    if exact.numel() == 0:
        return 0.0
    return ((found.float() - exact.float()).abs().max() / exact.abs().max().clamp(min=1e-6)).item()


def assert_close(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert error(found, exact) <= TOLERANCE[found.dtype]


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertTable]


@st.composite
def batches(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    widths: tuple[int, ...] = (16,),
    inters: tuple[int, ...] = (4, 24),
) -> Batch:
    experts = draw(st.integers(1, 9))
    tokens, top_k = draw(st.integers(0, 40)), draw(st.integers(1, 4))
    dtype, width = draw(st.sampled_from(dtypes)), draw(st.sampled_from(widths))
    # Few distinct ids: skew, empty experts, one token routed twice to one expert, ignored assignments.
    among = draw(st.lists(st.integers(-1, experts - 1), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pick = torch.randint(len(among), (tokens, top_k), generator=generator)
    ids = torch.tensor(among)[pick].to(draw(st.sampled_from([torch.int32, torch.int64])))
    weights = torch.rand(tokens, top_k, generator=generator)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    return hidden, ids, weights, layer(experts, width, draw(st.sampled_from(inters)), dtype)


@settings(max_examples=150, deadline=None)
@given(batches())
def test_any_routing_is_as_in_fp32(batch: Batch) -> None:
    hidden, ids, weights, table = batch
    exact = reference.moe(hidden.float(), ids, weights, in_fp32(table))
    assert_close(cpu.moe(hidden, ids, weights, table), exact)


@settings(max_examples=20, deadline=None)
@given(batches(widths=(8, 72, 130), inters=(4, 136)))
def test_any_routing_is_as_in_fp32_interpreted(batch: Batch) -> None:
    hidden, ids, weights, table = batch
    exact = reference.moe(hidden.float(), ids, weights, in_fp32(table))
    assert_close(moe("triton", hidden, ids, weights, table), exact)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("form", "activations"), QUANTISED)
@settings(max_examples=8, deadline=None)
@given(batches((torch.bfloat16,), widths=(40, 160), inters=(24, 144)))
def test_quantised_experts(implementation: str, form: Format, activations: bool, batch: Batch) -> None:
    hidden, ids, weights, table = batch
    table = quantised(table, form)
    exact = reference.moe(hidden.float(), ids, weights, table, quantize_activations=activations)
    found = moe(implementation, hidden, ids, weights, table, quantize_activations=activations)
    assert_close(found, exact)


@pytest.mark.parametrize(
    ("form", "activations", "bound"),
    [
        (Format.FP8, True, 0.12),
        (Format.FP8, False, 0.10),
        (Format.INT8, True, 0.05),
        (Format.INT8, False, 0.03),
    ],
)
def test_what_quantisation_costs(form: Format, activations: bool, bound: float) -> None:
    """Of the reference itself, against unquantised experts: random weights, so no outliers to gain from blocks."""
    table = layer(6, 256, 128, torch.float32)
    generator = torch.Generator().manual_seed(1)
    hidden, weights = torch.randn(40, 256, generator=generator), torch.rand(40, 2, generator=generator)
    ids = torch.randint(0, 6, (40, 2), generator=generator)
    exact = reference.moe(hidden, ids, weights, table)
    found = reference.moe(hidden, ids, weights, quantised(table, form), quantize_activations=activations)
    assert 0.0 < error(found, exact) <= bound


def test_scratch_memory_carries_nothing_over() -> None:
    workspace = Workspace()
    table = layer(4, 16, 8, torch.bfloat16)
    poison = torch.full((50, 16), float("nan"), dtype=torch.bfloat16)
    cpu.moe(poison, torch.zeros(50, 2, dtype=torch.int32), torch.ones(50, 2), table, workspace=workspace)
    held = workspace.nbytes
    hidden, ids = torch.randn(9, 16).bfloat16(), torch.tensor([[0, -1]] * 9)
    found = cpu.moe(hidden, ids, torch.ones(9, 2), table, workspace=workspace)
    assert_close(found, reference.moe(hidden.float(), ids, torch.ones(9, 2), in_fp32(table)))
    assert workspace.nbytes == held


def test_experts_may_lie_anywhere() -> None:
    stacked = layer(5, 16, 8, torch.bfloat16)
    hidden, ids, weights = torch.randn(30, 16).bfloat16(), torch.randint(0, 5, (30, 2)), torch.rand(30, 2)
    # Entries of a list: some copies, one a strided view of a wider matrix.
    wider = torch.zeros(16, 24, dtype=torch.bfloat16)
    wider[:, :16] = stacked.w13[3]
    w13 = [tensor.clone() for tensor in stacked.w13]
    w13[3] = wider[:, :16]
    scattered = ExpertTable(w13, [tensor.clone() for tensor in stacked.w2])
    assert torch.equal(cpu.moe(hidden, ids, weights, scattered), cpu.moe(hidden, ids, weights, stacked))


def test_addresses_may_lie_anywhere() -> None:
    stacked = layer(5, 16, 8, torch.bfloat16)
    hidden, ids, weights = torch.randn(30, 16).bfloat16(), torch.randint(0, 5, (30, 2)), torch.rand(30, 2)
    scattered = ExpertTable([tensor.clone() for tensor in stacked.w13], [tensor.clone() for tensor in stacked.w2])
    found = moe("triton", hidden, ids, weights, scattered)
    assert torch.equal(found, moe("triton", hidden, ids, weights, stacked))
    strided = ExpertTable([torch.zeros(16, 24, dtype=torch.bfloat16)[:, :16]], [stacked.w2[0]])
    with pytest.raises(ValueError, match=r"w13\[0\]: must be contiguous"):
        moe("triton", hidden, ids.clamp(max=0), weights, strided)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_output_may_be_the_input(implementation: str) -> None:
    table = layer(3, 16, 8, torch.bfloat16)
    hidden, ids, weights = torch.randn(12, 16).bfloat16(), torch.randint(0, 3, (12, 2)), torch.rand(12, 2)
    apart = moe(implementation, hidden, ids, weights, table)
    if implementation == "cpu":  # the other process works on a copy
        assert cpu.moe(hidden, ids, weights, table, out=hidden) is hidden
    else:
        hidden = moe(implementation, hidden, ids, weights, table, out=hidden)
    assert torch.equal(hidden, apart)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_routing_weights_keep_their_precision(implementation: str) -> None:
    """One expert, all outputs equal: what is left is how exactly a token's weights are summed."""
    table = ExpertTable(torch.ones(1, 2, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, dtype=torch.bfloat16))
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    weights = torch.tensor([[0.4971, 0.5029]])  # either is off by 1e-3 in bf16
    if implementation == "triton":  # entries aligned to 16 bytes
        table = ExpertTable([table.w13[0].clone()], [table.w2[0].clone()])
    one = moe(implementation, hidden, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), table)
    assert torch.equal(moe(implementation, hidden, torch.zeros(1, 2, dtype=torch.int32), weights, table), one)


def test_errors_name_what_does_not_fit() -> None:
    table = layer(3, 16, 8, torch.bfloat16)
    hidden = torch.randn(2, 16).bfloat16()
    ids, weights = torch.tensor([[0], [3]]), torch.ones(2, 1)
    for implementation in ("cpu", "reference", "triton"):
        if implementation != "triton":  # which does not look at ids on the host
            with pytest.raises(ValueError, match="expert id 3, but there are 3"):
                moe(implementation, hidden, ids, weights, table)
        with pytest.raises(ValueError, match="dtypes differ"):
            moe(implementation, hidden.float(), ids, weights, table)
        with pytest.raises(ValueError, match="topk_weights"):
            moe(implementation, hidden, ids, torch.ones(2, 2), table)
        with pytest.raises(ValueError, match="hidden size 8"):
            moe(implementation, hidden[:, :8], ids, weights, table)
        with pytest.raises(ValueError, match=r"w13_scale is None, want \(3, 2, 1\) for torch.float8_e4m3fn"):
            moe(implementation, hidden, ids, weights, quantised(table, Format.FP8)._replace(w13_scale=None))


def test_an_id_of_no_expert_is_ignored_on_a_device() -> None:
    table = layer(3, 16, 8, torch.bfloat16)
    hidden, weights = torch.randn(2, 16).bfloat16(), torch.ones(2, 1)
    found = moe("triton", hidden, torch.tensor([[0], [3]]), weights, table)
    assert torch.equal(found, moe("triton", hidden, torch.tensor([[0], [-1]]), weights, table))
    assert not found[1].any()


def test_experts_are_used_as_they_arrive() -> None:
    table = layer(6, 16, 8, torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    hidden, weights = torch.randn(40, 16, generator=generator).bfloat16(), torch.rand(40, 2, generator=generator)
    ids = torch.randint(-1, 6, (40, 2), generator=generator)
    found, raised = interpreter().call(
        "late_experts", "gathered_while_computing", hidden, ids, weights, table, [1, -1, 0, 1, -1, 0]
    )
    assert raised == [0, 1]
    # Another order of experts, the same sums.
    assert torch.equal(found, moe("triton", hidden, ids, weights, table))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
def test_an_expert_that_never_arrives_does_not_hang(implementation: str) -> None:
    table = layer(3, 16, 8, torch.bfloat16)
    hidden, weights = torch.randn(5, 16).bfloat16(), torch.ones(5, 1)
    ready = make_ready([-1, 0, -1], 1, limit=3)
    ids = torch.tensor([[0], [1], [2], [0], [-1]])
    if implementation == "triton":  # its process has a copy of the status
        with pytest.raises(TimeoutError, match=r"flags \[0\] below epoch 1"):
            interpreter().call("late_experts", "without_waiting", hidden, ids, weights, table, ready)
        return
    found = moe(implementation, hidden, ids, weights, table, ready=ready)
    with pytest.raises(TimeoutError, match=r"flags \[0\] below epoch 1"):
        ready.check()
    there = [0, 2, 3, 4]
    assert torch.equal(found[there], moe(implementation, hidden[there], ids[there], weights[there], table))
