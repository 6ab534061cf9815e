"""What a layout needs of each device's memory, and what of the experts has to stay in host memory."""

from __future__ import annotations

from dataclasses import dataclass

from asyncep.sim.errors import DoesNotFit
from asyncep.sim.hardware import Cluster
from asyncep.sim.work import Model

RESERVE = 0.06
"""Share of memory that contexts, communication buffers and fragmentation take (assumed)."""
EXPERT_CHUNK = 16_384
"""Tokens whose expert activations exist at once; more are done in turns (assumed, as vLLM's chunked MoE)."""


@dataclass(frozen=True)
class Shares:
    """How a strategy divides a model: share of each part that one device holds.

    `dense`: weights but experts. `experts`: of all of them. `kv`: of a cached token's bytes. `slots`: gathered layers
    held at once, each `remote` of a layer's experts. `activation_split`: ways the experts' width is divided.
    """

    dense: float
    experts: float
    kv: float
    slots: int = 0
    remote: float = 0.0
    activation_split: int = 1


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device. `host_share`: part of the device's experts that is in its host's memory. `kv_tokens`:
    tokens the cache has room for (0 in KV-free mode)."""

    dense: float
    experts: float
    slots: float
    activations: float
    kv: float
    host: float
    host_share: float
    kv_tokens: int
    capacity: float

    @property
    def total(self) -> float:
        """Bytes in use, reserve not counted."""
        return self.dense + self.experts + self.slots + self.activations + self.kv


def activation_bytes(model: Model, tokens: int, split: int = 1) -> float:
    """Peak of activations of a batch: six hidden vectors a token, and for at most `EXPERT_CHUNK` tokens the permuted
    inputs, outputs and both intermediate products of their experts. 2 bytes an element."""
    widest = max(kind.shape.mlp.expert_width for kind in model.kinds)
    dense = max(kind.shape.mlp.dense_width for kind in model.kinds)
    each = 2 * model.top_k * (model.hidden + widest / split) + 2 * dense / split
    return 2 * (6 * model.hidden * tokens + each * min(tokens, EXPERT_CHUNK))


def plan_memory(
    model: Model,
    cluster: Cluster,
    shares: Shares,
    *,
    batch_tokens: int,
    kv_tokens: int,
    kv_free: bool = False,
    host_limit: float = 0.0,
) -> MemoryPlan:
    """Divide a device's memory; raises `DoesNotFit` naming what is missing.

    `kv_tokens`: cache wanted at least. In KV-free mode only the layer at hand keeps its batch's keys and values.
    `host_limit`: share of a device's experts that may live in host memory, if it must.
    """
    capacity = cluster.device.memory_bytes * (1 - RESERVE)
    dense = model.dense_bytes * shares.dense
    experts = model.cost.expert_bytes * shares.experts
    layer = max(kind.expert_bytes for kind in model.kinds)
    slots = shares.slots * layer * shares.remote
    activations = activation_bytes(model, batch_tokens, shares.activation_split)
    per_token = model.cost.kv_bytes_per_token * 2 / model.cost.kv_itemsize * shares.kv
    wanted = per_token / model.layers * batch_tokens if kv_free else per_token * kv_tokens
    # What is in host memory passes through the slots too: each needs room for its share of the device's part.
    slot_cost = shares.slots * layer * shares.experts
    missing = dense + experts + slots + activations + wanted - capacity
    host_share = 0.0
    if missing > 0:
        gain = experts - slot_cost
        host_share = missing / gain if gain > 0 else float("inf")
        limit = min(1.0, host_limit, cluster.host_bytes / experts if experts else 0.0)
        if host_share > limit:
            short = missing - limit * max(0.0, gain)
            raise DoesNotFit(
                f"{model.name} ({model.dtype}): {(missing + capacity) / 1e9:.3g} GB a device wanted "
                f"({dense / 1e9:.3g} dense, {experts / 1e9:.3g} experts, {slots / 1e9:.3g} slots, "
                f"{activations / 1e9:.3g} activations of {batch_tokens} tokens, {wanted / 1e9:.3g} KV), "
                f"{capacity / 1e9:.3g} there; {short / 1e9:.3g} GB too much"
            )
    host = host_share * experts
    slots += host_share * slot_cost
    left = capacity - dense - (experts - host) - slots - activations
    kv = wanted if kv_free else left
    return MemoryPlan(
        dense=dense,
        experts=experts - host,
        slots=slots,
        activations=activations,
        kv=kv,
        host=host,
        host_share=host_share,
        kv_tokens=0 if kv_free else int(left / per_token),
        capacity=capacity,
    )
