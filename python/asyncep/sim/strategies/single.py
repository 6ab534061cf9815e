"""One scheduler over many devices: tensor, expert and pipeline parallelism."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from asyncep.sim.collectives import all_gather, tree_all_reduce
from asyncep.sim.hardware import Cluster
from asyncep.sim.kernels import ACTIVATION_BYTES, Kernels
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.strategies.base import Outcome
from asyncep.sim.strategies.coupled import exchanges
from asyncep.sim.work import Batch


class TensorParallel:
    """Every product divided over all devices, an all-reduce after attention and one after the experts."""

    lanes = 1

    def __init__(self, kernels: Kernels, cluster: Cluster, ranks: int) -> None:
        self.kernels = kernels
        self.cluster = cluster
        self.devices = ranks

    def run(self, now: float, batches: Sequence[Batch | None]) -> Outcome:
        batch = batches[0]
        if batch is None:
            return Outcome(now, (None,))
        kernels, model, ranks = self.kernels, self.kernels.model, self.devices
        reduce = tree_all_reduce(batch.tokens * model.hidden * ACTIVATION_BYTES, self.cluster, ranks)
        seconds = 0.0
        for index, kind in enumerate(model.kinds):
            mlp = kind.shape.mlp
            layer = kernels.attention(index, batch, ranks)
            layer += kernels.experts(index, batch.tokens * mlp.top_k, mlp.experts, ranks)
            seconds += kind.count * (layer + 2 * reduce)
        end = now + seconds + kernels.head(batch, ranks)
        return Outcome(end, (end,))


class ExpertParallel:
    """Attention tensor-parallel, experts whole on their device: tokens are scattered after attention, exchanged by
    two all-to-alls around the experts, and gathered for the next attention. Every layer waits for the hottest rank."""

    lanes = 1

    def __init__(self, kernels: Kernels, cluster: Cluster, ranks: int, skew: ExpertSkew, overlap: float = 0.0) -> None:
        self.kernels = kernels
        self.cluster = cluster
        self.devices = ranks
        self.overlap = overlap
        self.hottest = skew.hottest(kernels.model.experts, ranks, kernels.model.layers)

    def run(self, now: float, batches: Sequence[Batch | None]) -> Outcome:
        batch = batches[0]
        if batch is None:
            return Outcome(now, (None,))
        kernels, model, ranks = self.kernels, self.kernels.model, self.devices
        stream = batch.tokens * model.hidden * ACTIVATION_BYTES
        around = 2 * all_gather(stream, ranks, self.cluster.inside)
        if ranks > self.cluster.per_node:
            around = tree_all_reduce(stream, self.cluster, ranks)
        seconds = 0.0
        for index, kind in enumerate(model.kinds):
            mlp = kind.shape.mlp
            layer = kernels.attention(index, batch, ranks) + around
            if mlp.experts:
                rows = self.hottest * batch.tokens * mlp.top_k / ranks
                layer += kernels.experts(index, rows, mlp.experts / ranks)
                layer += (1 - self.overlap) * exchanges(
                    model.hidden, model.itemsize, batch.tokens / ranks, mlp.top_k, self.cluster, ranks, self.hottest
                )
            seconds += kind.count * layer
        end = now + seconds + kernels.head(batch, ranks)
        return Outcome(end, (end,))


class PipelineParallel:
    """Layers divided into stages, micro-batches one behind the other, at most one a stage in flight.

    start(s, b) = max(arrival(s, b), end(s, b - 1)): stages of unequal length and micro-batches of unequal work leave
    bubbles. A link carries one micro-batch at a time: arrival(s, b) = max(end(s - 1, b), link free) + bytes / B, and a.
    """

    lanes = 1

    def __init__(self, kernels: Kernels, cluster: Cluster, ranks: int) -> None:
        self.kernels = kernels
        self.cluster = cluster
        self.devices = ranks
        self.free = [0.0] * ranks
        self.wires = [0.0] * ranks  # when the link into each stage is free
        self.flying: deque[float] = deque()
        order = kernels.model.order
        bounds = [len(order) * stage // ranks for stage in range(ranks + 1)]
        self.stages = [order[first:last] for first, last in pairwise(bounds)]

    def run(self, now: float, batches: Sequence[Batch | None]) -> Outcome:
        batch = batches[0]
        if batch is None:
            return Outcome(now, (None,))
        kernels, model = self.kernels, self.kernels.model
        times = [sum(kernels.whole_layer(index, batch)) for index in range(len(model.kinds))]
        size = batch.tokens * model.hidden * ACTIVATION_BYTES
        end = now
        for stage, layers in enumerate(self.stages):
            if stage:
                link = self.cluster.inside if stage % self.cluster.per_node else self.cluster.between
                self.wires[stage] = max(end, self.wires[stage]) + size / link.bandwidth
                end = self.wires[stage] + link.latency
            seconds = sum(times[kind] for kind in layers)
            if stage == len(self.stages) - 1:
                seconds += kernels.head(batch)
            end = max(end, self.free[stage]) + seconds
            self.free[stage] = end
        self.flying.append(end)
        ready = self.free[0]
        if len(self.flying) >= self.devices:
            ready = max(ready, self.flying.popleft())
        return Outcome(ready, (end,))
