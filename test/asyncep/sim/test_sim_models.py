"""Curves, links, skew, work and memory: known answers and properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep.sim import collectives, hardware
from asyncep.sim.efficiency import Curve
from asyncep.sim.errors import DataError, DoesNotFit
from asyncep.sim.hardware import Cluster, Link
from asyncep.sim.kernels import Kernels
from asyncep.sim.memory import Shares, plan_memory
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.work import Batch, Model, uniform

SLOW = Link("slow", 10.0, 1.0)
QWEN = Model.from_config("qwen3-235b-a22b", hardware.model_config("qwen3-235b-a22b"))


@given(st.floats(0.05, 1), st.floats(0, 1000), st.lists(st.integers(1, 10_000), min_size=2, max_size=6, unique=True))
def test_a_fit_finds_the_curve_its_points_lie_on(top: float, half: float, rows: list[int]) -> None:
    curve = Curve(top, half)
    fitted = Curve.fit([(x, curve.at(x)) for x in rows])
    for x in rows:
        assert fitted.at(x) == pytest.approx(curve.at(x), rel=1e-3)


@pytest.mark.parametrize("points", [[], [(0, 0.5)], [(10, 0.0)], [(10, 1.5)]])
def test_a_fit_refuses_impossible_points(points: list[tuple[float, float]]) -> None:
    with pytest.raises(DataError, match="points"):
        Curve.fit(points)


def test_exchanges_by_hand() -> None:
    assert collectives.point_to_point(20, SLOW) == 3.0
    assert collectives.all_reduce(80, 4, SLOW) == 2 * 3 * 1 + 2 * 0.75 * 8
    assert collectives.all_gather(80, 4, SLOW) == 3 * 1 + 0.75 * 8
    assert collectives.all_to_all(80, 4, SLOW) == 1 + 0.75 * 8
    assert collectives.distinct(1, 8) == pytest.approx(1)
    assert collectives.distinct(2, 2) == 1.5
    assert all(f(80, 1, SLOW) == 0 for f in (collectives.all_reduce, collectives.all_gather, collectives.all_to_all))


def test_gathers_by_hand() -> None:
    device = hardware.machine("h100").device
    node = Cluster(device, 8, Link("in", 8.0), Link("out", 1.0), Link("host", 2.0), per_node=4)
    assert collectives.weight_gather(32, node, 1) == 0
    assert collectives.weight_gather(32, node, 4) == 24 / 8
    assert collectives.weight_gather(32, node, 8) == 16 / 1  # the other node's half; inside: 12 bytes, 1.5 s
    assert collectives.weight_gather(32, node, 4, host_share=1.0) == 8 / 2
    assert collectives.weight_gather(32, node, 1, host_share=0.5) == 16 / 2


def test_t_ep_of_the_notes() -> None:
    """5.9 ms for Qwen3-235B's layer in fp8 over eight H100s (360 GB/s); 48 ms over PCIe on one."""
    fp8 = Model.from_config("q", hardware.model_config("qwen3-235b-a22b"), "fp8")
    eight, one = hardware.cluster("h100", 8), hardware.cluster("h100", 1)
    layer = fp8.kinds[0].expert_bytes
    assert layer == pytest.approx(2.42e9, rel=0.01)
    assert collectives.weight_gather(layer, eight, 8) == pytest.approx(5.9e-3, rel=0.02)
    assert collectives.weight_gather(layer, one, 1, 1.0) == pytest.approx(48e-3, rel=0.02)


@given(st.integers(2, 256), st.floats(1, 64))
def test_skew_has_the_ratio_asked_for(experts: int, ratio: float) -> None:
    shares = ExpertSkew(ratio).shares(experts)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] / shares[-1] == pytest.approx(ratio)


def test_skew_of_the_paper() -> None:
    skew = ExpertSkew()
    assert skew.exponent(128) == pytest.approx(math.log(16) / math.log(128))
    loads = skew.loads(128, 8, 0)
    assert sum(loads) == pytest.approx(8)
    hottest = skew.hottest(128, 8, 94)
    assert 1.1 < hottest < 2
    assert skew.hottest(128, 128, 94) == pytest.approx(skew.shares(128)[0] * 128)  # one expert a rank
    assert ExpertSkew(1.0).hottest(128, 8, 94) == pytest.approx(1)
    with pytest.raises(DataError, match="ratio"):
        ExpertSkew(0.5)


@pytest.mark.parametrize("name", hardware.models())
@pytest.mark.parametrize("passes", [[(512, 0)], [(100, 412), (3000, 0), (1, 0)]])
def test_layers_sum_to_the_cost_models_flops(name: str, passes: list[tuple[int, int]]) -> None:
    model = Model.from_config(name, hardware.model_config(name))
    batch = Batch.of(model, passes)
    layers = sum(
        kind.count * ((kind.dense_flops + kind.expert_flops) * batch.tokens + batch.pairs[i])
        for i, kind in enumerate(model.kinds)
    )
    assert layers + model.cost.head_flops * len(passes) == pytest.approx(batch.flops)
    assert batch.flops == model.cost.batch_flops(passes)
    assert sum(kind.count for kind in model.kinds) == model.layers


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-30b-a3b", 30.5), ("qwen3-235b-a22b", 235), ("deepseek-v3", 671), ("gpt-oss-120b", 117)],
)
def test_models_have_their_published_size(name: str, billions: float) -> None:
    model = Model.from_config(name, hardware.model_config(name))
    assert model.cost.weight_bytes / 2 == pytest.approx(billions * 1e9, rel=0.02)


@given(st.sampled_from(("a100", "h100", "h200")), st.integers(1, 40_000), st.integers(1, 20_000))
def test_no_layer_is_faster_than_its_flops_at_peak(device: str, tokens: int, length: int) -> None:
    kernels = Kernels(hardware.machine(device).device, QWEN)
    batch = uniform(QWEN, tokens, length)
    seconds = sum(kind.count * sum(kernels.whole_layer(i, batch)) for i, kind in enumerate(QWEN.kinds))
    assert seconds + kernels.head(batch) >= kernels.bound(batch)


def test_experts_by_hand() -> None:
    """1,000 rows over 4 experts of a device that reaches half of its peak at 250 rows: twice the time of the FLOPs."""
    config = {**hardware.model_config("qwen3-30b-a3b"), "num_experts": 4, "num_experts_per_tok": 1}
    model = Model.from_config("tiny", config)
    row = {"memory_bytes": 1e12, "memory_bandwidth": 1e30, "peak": {"bf16": 1e12}, "narrow": 0}
    curve = {"top": 1.0, "half": 250}
    device = hardware.read_device("d", {**row, "gemm": {"bf16": curve}, "attention": curve})
    assert Kernels(device, model).experts(0, 1000, 4) == pytest.approx(2 * 1000 * 6 * 2048 * 768 / 1e12)


def test_memory_by_hand() -> None:
    cluster = hardware.cluster("h100", 8)
    plan = plan_memory(QWEN, cluster, Shares(1, 1 / 8, 1, 2, 7 / 8), batch_tokens=16_384, kv_tokens=0, host_limit=1)
    layer = 3 * 4096 * 1536 * 128 * 2
    assert plan.experts + plan.host == pytest.approx(94 * layer / 8)
    assert plan.dense == pytest.approx(QWEN.dense_bytes)
    assert plan.slots == pytest.approx(2 * layer * 7 / 8 + plan.host_share * 2 * layer / 8)
    assert plan.total == pytest.approx(plan.capacity)


def test_memory_says_what_is_missing() -> None:
    with pytest.raises(DoesNotFit, match="GB too much"):
        plan_memory(QWEN, hardware.cluster("h100", 8), Shares(1, 1, 1), batch_tokens=1024, kv_tokens=0)


def test_unknown_names_are_listed() -> None:
    with pytest.raises(DataError, match="h100"):
        hardware.machine("h1000")
    with pytest.raises(DataError, match="nvlink4"):
        hardware.link("token-ring")
    with pytest.raises(DataError, match="gpt-oss-120b"):
        hardware.model_config("gpt-5")
    with pytest.raises(DataError, match="fp8"):
        Kernels(hardware.machine("a100").device, Model.from_config("q", hardware.model_config("qwen3-30b-a3b"), "fp8"))
