"""What `bench/sim.py` runs: configurations, workloads, tuned baselines, sweeps. Returns plain data."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from asyncep.plan.planner import BATCHES
from asyncep.sim import hardware
from asyncep.sim.deployment import Deployment, Settings, deploy
from asyncep.sim.engine import Result, frontend, simulate, simulate_routed
from asyncep.sim.errors import DataError, DoesNotFit
from asyncep.sim.hardware import Cluster, Link
from asyncep.sim.kernels import Kernels
from asyncep.sim.paper_mix import SYNTHETIC_TOKENS, real_mix, synthetic
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.steady import Profile, Steady, steady
from asyncep.sim.strategies.amoe import Amoe
from asyncep.sim.strategies.asap import Asap
from asyncep.sim.strategies.registry import BASELINES
from asyncep.sim.work import Model
from asyncep.sim.workloads import TimedPrompt, few_shot_mix
from asyncep_router.baselines import BaselinePolicy, CacheAware, RoundRobin, ShortestQueue

SEED = 1
MACHINES = (("a100", "bf16"), ("h100", "bf16"), ("h100", "fp8"), ("h200", "fp8"))
MODELS = ("qwen3-235b-a22b", "deepseek-v3", "gpt-oss-120b")
BATCH_TOKENS = 32_768
ROUTED = "our router in front of the baselines too"


@dataclass(frozen=True)
class Scale:
    """How much is run: share of the real mix's requests, prompt tokens of a synthetic workload."""

    mix: float
    synthetic_tokens: int
    models: tuple[str, ...]
    ranks: int
    sweep: int


FULL = Scale(0.3, 4_000_000, MODELS, 1024, 17)
QUICK = Scale(0.03, 1_500_000, ("qwen3-235b-a22b",), 128, 5)


def workloads(scale: Scale) -> dict[str, list[TimedPrompt]]:
    """The paper's: its real mix and its four lengths."""
    found = {"mix": real_mix(seed=SEED, scale=scale.mix)}
    for name, tokens in SYNTHETIC_TOKENS.items():
        found[name] = synthetic(name, max(48, scale.synthetic_tokens // tokens), seed=SEED, spread=0.1)
    return found


def model_of(name: str, dtype: str) -> Model:
    """A known model."""
    return Model.from_config(name, hardware.model_config(name), dtype)


def compare_strategies(
    model: Model, cluster: Cluster, prompts: Sequence[TimedPrompt], skew: ExpertSkew, *, shares: bool
) -> dict[str, Any]:
    """AsyncEP with the router's policy, its ablations and bounds, and each baseline with the batch that suits it."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    out: dict[str, Any] = {}
    ours = Settings(batch_tokens=max(BATCH_TOKENS, 0 if shares else longest), kv_free=not shares)
    ours = replace(ours, kv_tokens=max(ours.kv_tokens, longest))
    for strategy, settings in (
        ("asyncep", ours),
        ("asyncep-collective", ours),
        ("replicated", replace(ours, unlimited=True)),
    ):
        try:
            deployment = deploy(strategy, model, cluster, skew=skew, settings=settings)
        except (DoesNotFit, DataError) as error:
            out[strategy] = {"refused": str(error)}
            continue
        out[strategy] = _result(deployment, simulate_routed(deployment, prompts))
    for strategy in BASELINES:
        out[strategy] = tuned(strategy, model, cluster, prompts, skew)
    return out


def tuned(
    strategy: str, model: Model, cluster: Cluster, prompts: Sequence[TimedPrompt], skew: ExpertSkew
) -> dict[str, Any]:
    """A baseline at the batch size (chunk) at which a tenth of the workload runs fastest, all requests at once."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    sample = prompts[: max(32, len(prompts) // 10)]
    best: tuple[float, Deployment] | None = None
    refused = ""
    for tokens in (2_048, 4_096, 8_192, 16_384, 32_768):
        settings = Settings(batch_tokens=tokens, kv_tokens=max(16_384, longest))
        try:
            deployment = deploy(strategy, model, cluster, skew=skew, settings=settings)
        except (DoesNotFit, DataError) as error:
            refused = str(error)
            break
        speed = simulate(deployment, sample).tokens_per_second
        if best is None or speed > best[0]:
            best = speed, deployment
    if best is None:
        return {"refused": refused}
    return _result(best[1], simulate(best[1], prompts))


def placements(model: Model, cluster: Cluster, prompts: Sequence[TimedPrompt], cache_tokens: int) -> dict[str, Any]:
    """AsyncEP under the router's policy and under others', with a cache of so many tokens a rank."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    settings = Settings(batch_tokens=BATCH_TOKENS, kv_tokens=max(cache_tokens, longest))
    try:
        deployment = deploy("asyncep", model, cluster, settings=settings)
    except DoesNotFit as error:
        return {"refused": str(error)}
    cap = max(cache_tokens, longest)
    deployment = replace(deployment, limits=replace(deployment.limits, cache_tokens=cap))
    ranks = cluster.devices
    return {
        name: _result(deployment, simulate(deployment, prompts, placer))
        for name, placer in (
            ("asyncep", frontend(deployment, ranks)),
            ("round_robin", BaselinePolicy(RoundRobin, ranks=ranks)),
            ("cache_aware", BaselinePolicy(CacheAware, ranks=ranks)),
            ("shortest_queue", BaselinePolicy(ShortestQueue, ranks=ranks)),
        )
    }


def ablations(model: Model, cluster: Cluster, prompts: Sequence[TimedPrompt]) -> dict[str, Any]:
    """Depth of the gather, and batches cut at a fraction or multiple of T."""
    out: dict[str, Any] = {}
    longest = max(len(prompt.token_ids) for prompt in prompts)
    base = Settings(batch_tokens=4 * BATCH_TOKENS, kv_tokens=max(65_536, longest))
    for name, settings in (
        *((f"depth {depth}", replace(base, depth=depth)) for depth in (1, 2, 3)),
        *((f"{factor:g} T", replace(base, threshold_scale=factor)) for factor in (0.25, 0.5, 1, 2, 4)),
    ):
        try:
            deployment = deploy("asyncep", model, cluster, settings=settings)
        except DoesNotFit as error:
            out[name] = {"refused": str(error)}
            continue
        out[name] = _result(deployment, simulate_routed(deployment, prompts))
    return out


def many_ranks(ranks: int) -> dict[str, Any]:
    """One run with the router's policy over so many ranks: how long it takes to simulate."""
    model, cluster = model_of("qwen3-235b-a22b", "fp8"), hardware.cluster("h100", ranks)
    prompts = few_shot_mix(ranks * 40, seed=SEED, tasks=max(57, ranks))
    started, cpu = time.perf_counter(), time.process_time()
    deployment = deploy("asyncep", model, cluster, group=8, settings=Settings(batch_tokens=BATCH_TOKENS))
    result = simulate_routed(deployment, prompts)
    took = {"wall_seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    return {"ranks": ranks, **took, **_result(deployment, result)}


def over_devices(counts: Sequence[int]) -> list[dict[str, Any]]:
    """1 to 512 H200s in nodes of eight, Qwen3-235B-A22B in fp8, prompts of 2,048 tokens: steady state."""
    model = model_of("qwen3-235b-a22b", "fp8")
    profile = Profile.of(model, synthetic("medium", 64, seed=SEED, length_scale=0.5))
    rows = []
    for count in counts:
        cluster = hardware.cluster("h200", count)
        node = min(8, count)
        for name, strategy, group, most in (
            ("asyncep, groups of a node", "asyncep", node, math.inf),
            ("asyncep, one group", "asyncep", count, math.inf),
            ("asyncep, groups of a node, 16K tokens a batch", "asyncep", node, 16_384),
            ("asyncep, one group, 16K tokens a batch", "asyncep", count, 16_384),
            ("dp-ep, groups of a node", "dp-ep", node, math.inf),
            ("dp-ep, one group", "dp-ep", count, math.inf),
            ("tp, groups of a node", "tp", node, math.inf),
            ("tp, one group", "tp", count, math.inf),
            ("pp, groups of a node", "pp", node, math.inf),
        ):
            best = best_steady(strategy, model, cluster, profile, group=group, backlog=most * count)
            rows.append(
                {"devices": count, "name": name, "per_device": best.tokens_per_second / count if best else None}
            )
    return rows


def over_links(model: Model, device: str, bandwidths: Sequence[float], length: int) -> list[dict[str, Any]]:
    """Steady throughput of each strategy on eight devices as the link changes; batches at their best."""
    profile = Profile.of(model, synthetic("short", 64, seed=SEED, length_scale=length / 512))
    rows = []
    for bandwidth in bandwidths:
        cluster = hardware.cluster(device, 8, inside=Link("swept", bandwidth, 3e-6))
        row: dict[str, Any] = {"bandwidth": bandwidth}
        for strategy in ("asyncep", *BASELINES):
            best = best_steady(strategy, model, cluster, profile)
            row[strategy] = best.tokens_per_second if best else None
        rows.append(row)
    return rows


def over_backlog(model: Model, device: str, tokens: Sequence[int], length: int) -> list[dict[str, Any]]:
    """The same as fewer tokens are under way on all eight devices together."""
    cluster = hardware.cluster(device, 8)
    profile = Profile.of(model, synthetic("short", 64, seed=SEED, length_scale=length / 512))
    rows = []
    for backlog in tokens:
        row: dict[str, Any] = {"tokens": backlog}
        for strategy in ("asyncep", *BASELINES):
            best = best_steady(strategy, model, cluster, profile, backlog=backlog)
            row[strategy] = best.tokens_per_second if best else None
        rows.append(row)
    return rows


def best_steady(
    strategy: str,
    model: Model,
    cluster: Cluster,
    profile: Profile,
    *,
    group: int | None = None,
    backlog: float = math.inf,
) -> Steady | None:
    """Over batch sizes such that at most `backlog` tokens are under way; None if nothing fits."""
    best: Steady | None = None
    group = group or cluster.devices
    lanes = cluster.devices // group if strategy in ("tp", "ep") else cluster.devices
    sizes = [tokens for tokens in BATCHES if tokens * lanes <= backlog]
    if backlog < math.inf:
        sizes = sorted({*sizes, max(1, int(backlog / lanes))})
    for tokens in sizes:
        gathers = strategy == "asyncep"
        settings = Settings(
            batch_tokens=max(tokens, profile.longest) if gathers else tokens, kv_free=gathers, kv_tokens=profile.longest
        )
        try:
            deployment = deploy(strategy, model, cluster, group=group, settings=settings)
        except (DoesNotFit, DataError):
            break
        result = steady(deployment, profile, tokens)
        if best is None or result.tokens_per_second > best.tokens_per_second:
            best = result
    return best


def three_systems(devices: int, tokens: int, *, with_amoe: bool) -> dict[str, Any]:
    """AsyncEP, ASAP and AMoE on as many H200s (fp8, Qwen3-235B-A22B), batches of so many tokens; steady state, the
    latter two with the division into attention and expert devices that suits them best."""
    model = model_of("qwen3-235b-a22b", "fp8")
    cluster, skew = hardware.cluster("h200", devices), ExpertSkew()
    kernels = Kernels(cluster.device, model)
    profile = Profile.of(model, synthetic("short", 64, seed=SEED))
    out: dict[str, Any] = {}
    for strategy in ("asyncep", "dp-ep"):
        settings = Settings(batch_tokens=tokens, kv_free=strategy == "asyncep", kv_tokens=16_384)
        deployment = deploy(strategy, model, cluster, group=min(8, devices), settings=settings)
        result = steady(deployment, profile, tokens)
        out[strategy] = {"tokens_per_second": result.tokens_per_second, "mfu": result.mfu}
    for name, system in (("asap", Asap), ("amoe", Amoe)):
        if name == "amoe" and not with_amoe:
            continue
        for attention in sorted({max(1, round(devices * share)) for share in (0.2, 0.25, 0.3, 0.375)}):
            batches = [profile.batch(tokens) for _ in range((6 if name == "asap" else 3) * attention)]
            run = system(kernels, cluster, attention, devices - attention, skew).run(batches)
            if run.tokens_per_second > out.get(name, {"tokens_per_second": 0.0})["tokens_per_second"]:
                out[name] = {
                    "tokens_per_second": run.tokens_per_second,
                    "mfu": run.flops / (run.seconds * devices * cluster.device.peak["fp8"]),
                    "attention_devices": attention,
                    "attention_busy": run.attention_busy,
                    "expert_busy": run.expert_busy,
                }
    return out


def assumptions(model: Model, device: str, prompts: Sequence[TimedPrompt]) -> dict[str, dict[str, Any]]:
    """AsyncEP's lead over each baseline when one assumption is another."""
    cluster, longest = hardware.cluster(device, 8), max(len(prompt.token_ids) for prompt in prompts)
    fast = replace(cluster.inside, bandwidth=cluster.inside.bandwidth * 1.25)
    cases: dict[str, tuple[Cluster, ExpertSkew, float]] = {
        "as assumed": (cluster, ExpertSkew(), 0.0),
        "experts evenly loaded (perfect balancing)": (cluster, ExpertSkew(1.0), 0.0),
        "exchanges of expert parallelism hidden entirely": (cluster, ExpertSkew(), 1.0),
        "both": (cluster, ExpertSkew(1.0), 1.0),
        "links at their data sheet's bandwidth": (replace(cluster, inside=fast), ExpertSkew(), 0.0),
        ROUTED: (cluster, ExpertSkew(), 0.0),
    }
    out: dict[str, dict[str, Any]] = {}
    for name, (changed, skew, overlap) in cases.items():
        settings = Settings(batch_tokens=BATCH_TOKENS, kv_tokens=max(65_536, longest))
        ours = simulate_routed(deploy("asyncep", model, changed, skew=skew, settings=settings), prompts)
        row = out.setdefault(name, {})
        for strategy, tokens in (("tp", 16_384), ("pp", 8_192), ("ep", 16_384), ("dp-ep", 4_096)):
            settings = Settings(batch_tokens=tokens, kv_tokens=max(16_384, longest), overlap=overlap)
            try:
                deployment = deploy(strategy, model, changed, skew=skew, settings=settings)
            except DoesNotFit:
                row[strategy] = None
                continue
            other = (simulate_routed if name == ROUTED else simulate)(deployment, prompts)
            row[strategy] = ours.tokens_per_second / other.tokens_per_second
    return out


def slower_kernels(model: Model, cluster: Cluster, prompts: Sequence[TimedPrompt], mfu: float) -> dict[str, Any]:
    """By what factor all kernels would have to be slower for AsyncEP's MFU to be `mfu`, and its lead then."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    profile = Profile.of(model, prompts)

    def slowed(factor: float) -> Cluster:
        device = cluster.device
        return replace(
            cluster,
            device=replace(
                device,
                gemm={dtype: replace(curve, top=curve.top / factor) for dtype, curve in device.gemm.items()},
                attention=replace(device.attention, top=device.attention.top / factor),
                glue=device.glue / factor,
                layer_seconds=device.layer_seconds * factor,
            ),
        )

    def speed(strategy: str, factor: float, tokens: int) -> Steady:
        settings = Settings(batch_tokens=tokens, kv_tokens=max(16_384, longest))
        return steady(deploy(strategy, model, slowed(factor), settings=settings), profile, tokens)

    low, high = 1.0, 8.0
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if speed("asyncep", middle, 16_384).mfu > mfu else (low, middle)
    leads = {}
    for strategy in BASELINES:
        try:
            leads[strategy] = (
                speed("asyncep", high, 16_384).tokens_per_second / speed(strategy, high, 8_192).tokens_per_second
            )
        except DoesNotFit:
            leads[strategy] = None
    return {"mfu": mfu, "factor": high, "lead_in_steady_state": leads}


def _result(deployment: Deployment, result: Result) -> dict[str, Any]:
    memory = deployment.memory
    return {
        **result.figures(),
        "tokens_per_second": result.tokens_per_second,
        "requests_per_second": result.requests_per_second,
        "batch_tokens_limit": deployment.limits.tokens,
        "threshold_tokens": deployment.threshold_tokens,
        "t_ep": deployment.t_ep,
        "host_share": memory.host_share if memory else None,
        "kv_tokens": deployment.limits.cache_tokens,
    }
