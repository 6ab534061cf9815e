"""Ranks with lanes of their own that meet at every layer."""

from __future__ import annotations

from collections.abc import Sequence

from asyncep.sim.collectives import token_exchange
from asyncep.sim.hardware import Cluster
from asyncep.sim.kernels import Kernels
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.strategies.base import Outcome
from asyncep.sim.strategies.independent import layer_runs
from asyncep.sim.work import Batch

COLLECTIVE_TAX = 0.15
"""Share of a device's computing units that a collective's kernels occupy while they run (assumed: 16 to 24 of 132
multiprocessors under NCCL; copy engines and one-sided reads occupy none)."""


class DataParallelExperts:
    """Data-parallel attention, synchronous expert parallelism: a layer takes the slowest rank's attention, an
    all-to-all, the hottest rank's experts and an all-to-all back. `overlap`: share of the exchanges hidden behind
    computation (two-batch overlap); 0 by default."""

    def __init__(self, kernels: Kernels, cluster: Cluster, ranks: int, skew: ExpertSkew, overlap: float = 0.0) -> None:
        self.kernels = kernels
        self.cluster = cluster
        self.lanes = self.devices = ranks
        self.overlap = overlap
        model = kernels.model
        self.hottest = skew.hottest(model.experts, ranks, model.layers)

    def run(self, now: float, batches: Sequence[Batch | None]) -> Outcome:
        kernels, model, ranks = self.kernels, self.kernels.model, self.lanes
        work = [batch for batch in batches if batch is not None]
        if not work:
            return Outcome(now, (None,) * ranks)
        tokens = sum(batch.tokens for batch in work)
        busiest = max(batch.tokens for batch in work)
        seconds = 0.0
        for index, kind in enumerate(model.kinds):
            attention = max(kernels.attention(index, batch) for batch in work)
            experts = exchange = 0.0
            if kind.shape.mlp.experts:
                k = kind.shape.mlp.top_k
                experts = kernels.experts(index, self.hottest * tokens * k / ranks, kind.shape.mlp.experts / ranks)
                exchange = exchanges(model.hidden, model.itemsize, busiest, k, self.cluster, ranks, self.hottest)
            seconds += kind.count * (attention + experts + (1 - self.overlap) * exchange)
        end = now + seconds + max(kernels.head(batch) for batch in work)
        return Outcome(end, tuple(None if batch is None else end for batch in batches))


def exchanges(
    hidden: int, itemsize: float, tokens: float, top_k: int, cluster: Cluster, ranks: int, hottest: float
) -> float:
    """Both all-to-alls of a layer: out in the weights' data type, back in bf16."""
    out = token_exchange(tokens, hidden * itemsize, top_k, cluster, ranks, hottest)
    return out + token_exchange(tokens, hidden * 2, top_k, cluster, ranks, hottest)


class CollectiveGather:
    """AsyncEP by an all-gather in which all ranks take part: a gather begins when the last rank has a slot free.

    All ranks begin a batch together (what they could run ahead of each other is at most `depth` layers).
    """

    def __init__(self, kernels: Kernels, gather: float, ranks: int, depth: int = 2) -> None:
        self.kernels = kernels
        self.gather = gather
        self.lanes = self.devices = ranks
        self.depth = depth
        self.gathered = 0.0
        self.released = [[0.0] * ranks for _ in range(depth)]

    def run(self, now: float, batches: Sequence[Batch | None]) -> Outcome:
        work = {lane: batch for lane, batch in enumerate(batches) if batch is not None}
        if not work:
            return Outcome(now, (None,) * self.lanes)
        tax = COLLECTIVE_TAX * self.gather
        layers = {
            lane: [run for part in layer_runs(self.kernels, batch, self.gather, tax) for run in [part] * part.count]
            for lane, batch in work.items()
        }
        clocks = [now] * self.lanes
        stalled = 0.0
        for step in range(max(len(runs) for runs in layers.values())):
            gather = next(iter(layers.values()))[step].gather
            self.gathered = max(self.gathered, max(self.released[0])) + gather
            for lane in range(self.lanes):
                if lane not in layers:  # it takes part in the gather and computes nothing
                    clocks[lane] = max(clocks[lane], self.gathered)
                    continue
                run = layers[lane][step]
                before = clocks[lane] + run.attention
                clocks[lane] = max(before, self.gathered) + run.experts
                stalled += max(0.0, self.gathered - before)
            self.released = [*self.released[1:], list(clocks)]
        ends = tuple(
            clocks[lane] + self.kernels.head(work[lane]) if lane in work else None for lane in range(self.lanes)
        )
        ready = max(end for end in ends if end is not None)
        return Outcome(ready, ends, stalled)
