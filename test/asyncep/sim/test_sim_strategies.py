"""Whole deployments: bounds, limits, and runs through the router's policy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep.sim import hardware
from asyncep.sim.deployment import Settings, deploy, window_tokens
from asyncep.sim.engine import frontend, simulate, simulate_routed
from asyncep.sim.errors import DataError, DoesNotFit, SimulationError
from asyncep.sim.hardware import Cluster, Link
from asyncep.sim.kernels import Kernels
from asyncep.sim.lane import BatchLimits, Lane, Waiting
from asyncep.sim.paper_mix import real_mix, synthetic
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.strategies import OneSidedGather, PipelineParallel, TensorParallel
from asyncep.sim.strategies.registry import NAMES, PROPOSED, find
from asyncep.sim.work import Batch, Model, uniform

if TYPE_CHECKING:
    from asyncep.sim.deployment import Deployment

MODEL = Model.from_config("qwen3-30b-a3b", hardware.model_config("qwen3-30b-a3b"))
H100 = hardware.machine("h100").device
FREE = Settings(unlimited=True)


def cluster(bandwidth: float, devices: int = 4) -> Cluster:
    return Cluster(H100, devices, Link("l", bandwidth), Link("l", bandwidth), Link("l", bandwidth), per_node=8)


def one_batch(deployment: Deployment, tokens: int, length: int = 512) -> float:
    """Seconds a batch takes in each lane, after the first ones."""
    executor = deployment.make()[0]
    batch = uniform(deployment.model, tokens, length)
    ready, last = 0.0, []
    for _ in range(13 if deployment.strategy == "pp" else 3):
        outcome = executor.run(ready, [batch] * executor.lanes)
        ready = outcome.ready
        last.append(outcome.ends[0])
    assert last[-1] is not None
    assert last[-2] is not None
    return last[-1] - last[-2]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(NAMES), st.floats(1e8, 1e12), st.integers(1, 20_000), st.integers(1, 4_000))
def test_nothing_is_faster_than_its_flops(strategy: str, bandwidth: float, tokens: int, length: int) -> None:
    deployment = deploy(strategy, MODEL, cluster(bandwidth), settings=FREE)
    executor = deployment.make()[0]
    batch = uniform(MODEL, tokens, length)
    outcome = executor.run(0.0, [batch] * executor.lanes)
    assert outcome.ends[0] is not None
    # An idle neighbour computes a part of it.
    computing = 4 if strategy == "auto" else executor.devices
    bound = Kernels(H100, MODEL).bound(batch) * executor.lanes / computing
    assert outcome.ends[0] >= bound
    assert one_batch(deployment, tokens, length) >= bound * (1 - 1e-9)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(NAMES), st.floats(1e8, 1e12), st.floats(1.01, 100), st.integers(1, 20_000))
def test_a_faster_link_never_hurts(strategy: str, bandwidth: float, factor: float, tokens: int) -> None:
    slow, fast = (
        one_batch(deploy(strategy, MODEL, cluster(speed), settings=FREE), tokens)
        for speed in (bandwidth, bandwidth * factor)
    )
    assert fast <= slow * (1 + 1e-9)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 20_000), st.integers(1, 4_000))
def test_asyncep_over_an_infinite_link_is_replicated_data_parallel(tokens: int, length: int) -> None:
    infinite = cluster(float("inf"))
    asyncep, replicated = (
        one_batch(deploy(strategy, MODEL, infinite, settings=FREE), tokens, length)
        for strategy in ("asyncep", "replicated")
    )
    assert asyncep == pytest.approx(replicated)


@given(st.sampled_from((1e9, 1e10, 1e11)), st.integers(128, 4096))
@settings(deadline=None, max_examples=20)
def test_at_t_the_gather_hides_and_at_half_of_it_does_not(bandwidth: float, reference: int) -> None:
    deployment = deploy("asyncep", MODEL, cluster(bandwidth), settings=replace(FREE, gamma=1.0, reference=reference))
    kernels = Kernels(H100, MODEL)
    tokens = window_tokens(kernels, deployment.t_ep, 1.0, reference)
    assert tokens == deployment.threshold_tokens
    times = {}
    for share in (1.02, 0.5):
        rank = OneSidedGather(kernels, deployment.t_ep)
        batch = uniform(MODEL, max(1, round(tokens * share)), reference)
        end = rank.run(0.0, [batch]).ready
        times[share] = rank.run(end, [batch]).stalled / (deployment.t_ep * MODEL.sparse_layers)
    assert times[1.02] <= 0.01
    if tokens > 2 * reference:
        assert times[0.5] > 0.05


@settings(deadline=None, max_examples=40)
@given(st.floats(1e8, 1e12), st.integers(1, 20_000))
def test_auto_takes_no_longer_than_gathering_and_computing_in_turn_and_idle_ranks_only_help(
    bandwidth: float, tokens: int
) -> None:
    deployment = deploy("auto", MODEL, cluster(bandwidth), settings=FREE)
    batch = uniform(MODEL, tokens, 512)
    alone = deployment.make()[0].run(0.0, [batch]).ready
    executors = deployment.make()
    for executor in executors[1:]:
        executor.run(0.0, [uniform(MODEL, 200_000, 512)])
    busy = executors[0].run(0.0, [batch]).ready
    assert alone <= busy * (1 + 1e-9)
    layers = MODEL.sparse_layers * max(deployment.t_ep, 0.0)
    replicated = deploy("asyncep", MODEL, cluster(float("inf")), settings=FREE).make()[0].run(0.0, [batch]).ready
    # Prices are straight lines and kernels are not quite.
    assert busy <= 1.1 * (replicated + layers)


def test_more_skew_slows_synchronous_experts_and_not_asyncep() -> None:
    def seconds(strategy: str, ratio: float) -> float:
        return one_batch(deploy(strategy, MODEL, cluster(1e11), skew=ExpertSkew(ratio), settings=FREE), 8192)

    for strategy in ("ep", "dp-ep"):
        assert seconds(strategy, 16) > seconds(strategy, 2) > seconds(strategy, 1)
    for strategy in ("asyncep", "asyncep-collective", "tp", "pp"):
        assert seconds(strategy, 16) == seconds(strategy, 1)


def test_a_long_batch_of_one_rank_holds_up_the_others_only_under_barriers() -> None:
    long, short = uniform(MODEL, 32_768, 512), uniform(MODEL, 4096, 512)
    link = cluster(1e11, 2)
    for strategy in ("dp-ep", "asyncep-collective"):
        executor = deploy(strategy, MODEL, link, settings=FREE).make()[0]
        alone = executor.run(0.0, [short, short]).ends[1]
        executor = deploy(strategy, MODEL, link, settings=FREE).make()[0]
        beside = executor.run(0.0, [long, short]).ends[1]
        assert alone is not None
        assert beside is not None
        assert beside > 1.5 * alone
    first, second = deploy("asyncep", MODEL, link, settings=FREE).make()
    expected = second.run(0.0, [short]).ends[0]
    first.run(0.0, [long])
    fresh = deploy("asyncep", MODEL, link, settings=FREE).make()[1]
    assert fresh.run(0.0, [short]).ends[0] == expected


def test_tensor_parallel_by_hand() -> None:
    """The step is layers, two all-reduces each, and the head."""
    link = cluster(1e11, 2)
    kernels = Kernels(H100, MODEL)
    batch = uniform(MODEL, 2048, 512)
    reduce = 2 * (2048 * 2048 * 2 / 2) / 1e11  # reduce-scatter and all-gather of half the bytes
    layer = kernels.attention(0, batch, 2) + kernels.experts(0, 2048 * 8, 128, 2) + 2 * reduce
    assert TensorParallel(kernels, link, 2).run(0.0, [batch]).ready == pytest.approx(
        48 * layer + kernels.head(batch, 2)
    )


def test_a_pipeline_of_equal_micro_batches_has_no_bubble_but_the_head() -> None:
    link = cluster(1e15, 4)
    kernels = Kernels(H100, MODEL)
    batch = uniform(MODEL, 2048, 512)
    stage = 12 * sum(kernels.whole_layer(0, batch))
    pipeline = PipelineParallel(kernels, link, 4)
    ready, ends = 0.0, []
    for _ in range(9):
        outcome = pipeline.run(ready, [batch])
        ready = outcome.ready
        ends.append(outcome.ends[0])
    assert ends[0] == pytest.approx(4 * stage + kernels.head(batch), rel=1e-6)
    assert ends[8] is not None
    assert ends[7] is not None
    assert ends[8] - ends[7] == pytest.approx(stage + kernels.head(batch), rel=1e-6)


def test_a_pipeline_is_no_faster_than_its_slowest_link() -> None:
    link = cluster(1e8, 4)
    batch = uniform(MODEL, 2048, 512)
    assert one_batch(deploy("pp", MODEL, link, settings=FREE), 2048) == pytest.approx(
        batch.tokens * MODEL.hidden * 2 / 1e8
    )


def test_a_lane_cuts_chunks_and_finds_prefixes_of_earlier_batches_only() -> None:
    lane = Lane(MODEL, BatchLimits(tokens=100, cache_tokens=10_000, page=10))
    for rid, chain in (("a", (1, 2, 3)), ("b", (1, 2, 4)), ("c", (1, 2, 5))):
        lane.push(Waiting(rid, 40, chain))
    first = lane.cut()
    assert first is not None
    assert (first.work.tokens, first.finished, first.cached) == (100, ["a", "b"], {"a": 0, "b": 0, "c": 0})
    second = lane.cut()
    assert second is not None
    assert (second.work.tokens, second.work.cached, second.finished) == (20, 20, ["c"])
    lane.push(Waiting("d", 40, (1, 2, 6)))
    third = lane.cut()
    assert third is not None
    assert (third.work.tokens, third.cached) == (20, {"d": 20})
    assert lane.cut() is None


def test_without_chunks_a_long_prompt_has_a_batch_to_itself() -> None:
    lane = Lane(MODEL, BatchLimits(tokens=100, chunk=False))
    for rid, length in (("a", 30), ("b", 500), ("c", 30)):
        lane.push(Waiting(rid, length, ()))
    cuts = [lane.cut(), lane.cut(), lane.cut()]
    assert [cut.finished for cut in cuts if cut] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("strategy", NAMES)
def test_every_request_is_answered_and_counted_once(strategy: str) -> None:
    prompts = real_mix(seed=3, scale=0.004, rate=2000)
    deployment = deploy(strategy, MODEL, hardware.cluster("h100", 4))
    result = simulate_routed(deployment, prompts)
    assert result.requests == len(prompts)
    assert 0 < result.mfu < 1
    assert result.p50 <= result.p99 <= result.makespan
    full = Batch.of(MODEL, [(len(prompt.token_ids), 0) for prompt in prompts])
    assert result.flops <= full.flops
    assert (result.cached_share > 0) == (result.flops < full.flops)


def test_the_routers_policy_computes_less_than_round_robin() -> None:
    prompts = real_mix(seed=1, scale=0.03)
    deployment = deploy("asyncep", MODEL, hardware.cluster("h100", 8), settings=Settings(batch_tokens=8192))
    placer = frontend(deployment, 8)
    ours, default = simulate(deployment, prompts, placer), simulate(deployment, prompts)
    placer.check_integrity()
    assert ours.flops < 0.9 * default.flops
    assert ours.cached_share > default.cached_share


def test_the_router_keeps_a_pipeline_full() -> None:
    prompts = synthetic("short", 400, seed=1, spread=0.3)
    deployment = deploy("pp", MODEL, hardware.cluster("h100", 8), settings=Settings(batch_tokens=4096))
    routed, plain = simulate_routed(deployment, prompts), simulate(deployment, prompts)
    assert routed.tokens_per_second > 0.95 * plain.tokens_per_second


def test_synthetic_prompts_share_nothing() -> None:
    deployment = deploy("asyncep", MODEL, hardware.cluster("h100", 2))
    result = simulate_routed(deployment, synthetic("short", 200, seed=1))
    assert result.cached_share == 0
    assert result.tokens == 200 * 512


def test_what_cannot_be_is_refused() -> None:
    big = Model.from_config("q", hardware.model_config("qwen3-235b-a22b"))
    with pytest.raises(DoesNotFit, match="GB"):
        deploy("replicated", big, hardware.cluster("h100", 8))
    with pytest.raises(DataError, match="strategy"):
        deploy("magic", MODEL, cluster(1e11))
    with pytest.raises(DataError, match="group"):
        deploy("tp", MODEL, cluster(1e11, 4), group=5)
    with pytest.raises(DoesNotFit, match="stages"):
        deploy("pp", MODEL, cluster(1e11, 64), settings=FREE)
    with pytest.raises(SimulationError, match="no requests"):
        simulate(deploy("tp", MODEL, cluster(1e11)), [])


def test_what_the_runtime_serves_is_simulated_by_the_same_name() -> None:
    from asyncep_sgl.strategies.registry import NAMES as SERVED

    assert set(SERVED) <= set(NAMES)
    assert set(SERVED) - {"auto"} <= set(PROPOSED) <= set(NAMES)


def test_an_old_name_serves_for_one_version_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert find("dp") is find("replicated")
    assert "'dp' is now called 'replicated'" in caplog.text
    with pytest.raises(DataError, match="strategy 'nothing': known are asyncep, replicated"):
        find("nothing")
