"""Builds a strategy on a cluster: memory, T, batch limits, executors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from asyncep.sim.collectives import weight_gather
from asyncep.sim.errors import DataError
from asyncep.sim.hardware import Cluster
from asyncep.sim.kernels import Kernels
from asyncep.sim.lane import BatchLimits
from asyncep.sim.memory import MemoryPlan, plan_memory
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.strategies.base import Executor
from asyncep.sim.strategies.registry import Site, Strategy, find
from asyncep.sim.work import Model, uniform

GAMMA = 1.2
"""Margin of the paper's threshold T = t_EP · F · gamma (second-hand)."""


@dataclass(frozen=True)
class Settings:
    """`batch_tokens`: tokens of a batch at most (of each lane). `kv_tokens`: cache each lane should have at least.
    `kv_free`: no cache, whole prompts only. `depth`: gathered layers held. `gamma`: margin of T.
    `threshold_scale`: batches are cut at this many T. `overlap`: share of expert parallelism's exchanges hidden.
    `host`: share of the experts that may live in host memory (AsyncEP only). `unlimited`: ignore memory (an upper
    bound, marked as such).
    `reference`: tokens of a request at which T is calibrated."""

    batch_tokens: int = 32_768
    kv_tokens: int = 65_536
    kv_free: bool = False
    depth: int = 2
    gamma: float = GAMMA
    threshold_scale: float = 1.0
    overlap: float = 0.0
    host: float = 1.0
    unlimited: bool = False
    reference: int = 512
    page: int = 64


@dataclass(frozen=True)
class Deployment:
    """A strategy ready to run. `make` yields fresh executors, one for each clock.

    `t_ep`: seconds of a layer's gather; `threshold`: T in FLOPs per layer, from the window the kernels need;
    `peak_threshold`: the same from the device's peak, as the paper has it; `threshold_tokens`: T in tokens of requests
    of the reference length. All 0 (threshold: of the batch) for strategies that gather nothing.
    """

    kind: Strategy
    model: Model
    cluster: Cluster
    group: int
    limits: BatchLimits
    memory: MemoryPlan | None
    make: Callable[[], list[Executor]]
    t_ep: float
    threshold: float
    peak_threshold: float
    threshold_tokens: int

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return self.kind.name

    @property
    def devices(self) -> int:
        """Devices in use."""
        return self.cluster.devices // self.group * self.group


def window_tokens(kernels: Kernels, t_ep: float, gamma: float, reference: int) -> int:
    """Tokens (in requests of `reference`) from which a pass computes at least `gamma` times as long as its gathers."""
    model = kernels.model
    need = gamma * t_ep * model.sparse_layers

    def busy(tokens: int) -> float:
        batch = uniform(model, tokens, reference)
        return sum(kind.count * sum(kernels.whole_layer(i, batch)) for i, kind in enumerate(model.kinds))

    if need <= 0:
        return 0
    low, high = 0, reference
    while busy(high) < need:
        low, high = high, high * 2
        if high > 1 << 34:
            return high
    while high - low > max(1, high // 256):
        middle = (low + high) // 2
        low, high = (low, middle) if busy(middle) >= need else (middle, high)
    return high


def deploy(
    strategy: str,
    model: Model,
    cluster: Cluster,
    *,
    group: int | None = None,
    skew: ExpertSkew | None = None,
    settings: Settings | None = None,
) -> Deployment:
    """A strategy on groups of `group` devices (all of them by default). Raises `DataError`, `DoesNotFit`."""
    settings = settings or Settings()
    kind = find(strategy)
    ranks = kind.ranks(group, cluster)
    if not 1 <= ranks <= cluster.devices:
        raise DataError(f"group={ranks}: must be between 1 and the cluster's {cluster.devices} devices")
    kind.check(model, ranks)
    kernels = Kernels(cluster.device, model)
    memory = _memory(kind, model, cluster, ranks, settings)
    t_ep = 0.0
    if kind.gathers:
        layer = max(layer.expert_bytes for layer in model.kinds)
        t_ep = weight_gather(layer, cluster, ranks, memory.host_share if memory else 0.0)
    tokens = window_tokens(kernels, t_ep, settings.gamma, settings.reference)
    limits, threshold = _limits(kind, model, memory, settings, tokens)
    site = Site(kernels, cluster, ranks, skew or ExpertSkew(), settings.overlap, settings.depth, t_ep)
    return Deployment(
        kind=kind,
        model=model,
        cluster=cluster,
        group=ranks,
        limits=limits,
        memory=memory,
        make=lambda: kind.executors(site),
        t_ep=t_ep,
        threshold=threshold,
        peak_threshold=t_ep * cluster.device.peak[model.dtype] * settings.gamma,
        threshold_tokens=tokens,
    )


def _limits(
    kind: Strategy, model: Model, memory: MemoryPlan | None, settings: Settings, tokens: int
) -> tuple[BatchLimits, float]:
    """Batch limits and T per layer. Without a gather T is a full batch: its router fills ranks alike."""
    most = settings.batch_tokens
    # Below a few thousand tokens experts see few rows, gather or not: T is never less than that.
    least = min(most, 8_192)
    wanted = min(most, max(tokens, least)) if kind.gathers else most
    per_pass = uniform(model, wanted, settings.reference).flops
    threshold = settings.threshold_scale * per_pass / model.layers
    cache = 0 if settings.kv_free else (memory.kv_tokens if memory else 1 << 40)
    limits = BatchLimits(
        tokens=most,
        flops=settings.threshold_scale * per_pass if kind.gathers else math.inf,
        chunk=not settings.kv_free,
        cache_tokens=cache,
        page=settings.page,
    )
    return limits, threshold


def _memory(kind: Strategy, model: Model, cluster: Cluster, ranks: int, settings: Settings) -> MemoryPlan | None:
    if settings.unlimited:
        return None
    heads = min(layer.attention.kv_heads for layer in model.cost.shape.layers)
    latent = any(layer.attention.latent_dim for layer in model.cost.shape.layers)
    kv_split = 1.0 if latent else max(1 / ranks, 1 / heads)  # latents and surplus heads are repeated on every device
    shares = kind.shares(ranks, kv_split, settings.depth)
    return plan_memory(
        model,
        cluster,
        shares,
        batch_tokens=kind.batch_tokens(settings.batch_tokens, ranks),
        kv_tokens=settings.kv_tokens,
        kv_free=settings.kv_free,
        host_limit=settings.host if kind.gathers else 0.0,
    )
