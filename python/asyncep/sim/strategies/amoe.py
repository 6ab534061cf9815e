"""AMoE (arXiv 2505.08944): a queue for every (block, expert), drained by whoever owns the expert.

An expert device takes the queue with the largest defragging score and runs all of it as one batch:

    score[b][e] = Q[b][e] + sum over k = 1 … K of delta^k · sum over e' of Q[(b + k) mod N_B][e'] / N_E,  where Q > 0

N_E: experts of the device. Here a unit of tokens (one attention launch) moves on when all of its parts are back; the
original moves token by token, so it waits less for a unit's hottest expert. Attention devices re-batch too: all units
that wait at the block where most tokens wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from asyncep.sim.hardware import Cluster
from asyncep.sim.kernels import Kernels
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.strategies.disaggregated import Backlog, Clock, message_seconds
from asyncep.sim.work import Batch

LOOK_AHEAD = 4
DECAY = 0.8


def defragging_scores(
    queues: NDArray[np.float64], look_ahead: int = LOOK_AHEAD, decay: float = DECAY
) -> NDArray[np.float64]:
    """Scores [blocks, experts] of queues' rows [blocks, experts]; -1 where nothing waits."""
    blocks, experts = queues.shape
    sums = queues.sum(axis=1)
    ahead = np.zeros(blocks)
    for k in range(1, look_ahead + 1):
        ahead += decay**k * np.roll(sums, -k)
    scores: NDArray[np.float64] = np.where(queues > 0, queues + (ahead / experts)[:, None], -1.0)
    return scores


class Amoe:
    """`attention` devices and `experts` devices of a cluster; `in_flight`: units an attention device has under way."""

    def __init__(
        self,
        kernels: Kernels,
        cluster: Cluster,
        attention: int,
        experts: int,
        skew: ExpertSkew,
        in_flight: int = 2,
    ) -> None:
        model = kernels.model
        self.kernels = kernels
        self.cluster = cluster
        self.attention = attention
        self.experts = experts
        self.skew = skew
        self.in_flight = in_flight
        self.sparse = [layer for layer, kind in enumerate(model.order) if model.kinds[kind].shape.mlp.experts]
        self.owned = [
            [expert for expert in range(model.experts) if expert * experts // model.experts == rank]
            for rank in range(experts)
        ]
        self.shares = [self._shares(layer) for layer in self.sparse]

    def _shares(self, layer: int) -> list[float]:
        return list(self.skew.loads(self.kernels.model.experts, self.kernels.model.experts, layer))

    def run(self, batches: Sequence[Batch]) -> Backlog:
        """Work off units that all wait at the start."""
        self.clock = Clock()
        self.waiting = deque(batches)
        self.at_block: list[dict[int, list[Batch]]] = [{} for _ in range(self.attention)]
        self.computing = [False] * self.attention
        self.under_way = [0] * self.attention
        blocks = len(self.sparse)
        self.queues = [np.zeros((blocks, len(owned))) for owned in self.owned]
        self.parts: dict[tuple[int, int, int], list[tuple[Batch, int, float]]] = {}
        self.serving = [False] * self.experts
        self.missing: dict[tuple[int, int], int] = {}
        self.busy_attention = self.busy_experts = self.rows = 0.0
        self.launches = 0
        for _ in range(self.in_flight):
            for device in range(self.attention):
                self._admit(device)
        self.clock.run()
        seconds = self.clock.now
        return Backlog(
            seconds=seconds,
            tokens=sum(batch.tokens for batch in batches),
            flops=sum(batch.flops for batch in batches),
            devices=self.attention + self.experts,
            attention_busy=self.busy_attention / (seconds * self.attention),
            expert_busy=self.busy_experts / (seconds * self.experts),
            launches=self.launches,
            rows=self.rows / blocks if blocks else 0.0,
        )

    def _admit(self, device: int) -> None:
        if self.waiting and self.under_way[device] < self.in_flight:
            self.under_way[device] += 1
            self.at_block[device].setdefault(0, []).append(self.waiting.popleft())
            self._attend(device)

    def _attend(self, device: int) -> None:
        queued = self.at_block[device]
        if self.computing[device] or not queued:
            return
        block = max(queued, key=lambda b: (sum(unit.tokens for unit in queued[b]), b))
        units = queued.pop(block)
        model = self.kernels.model
        first = self.sparse[block - 1] + 1 if block else 0
        last = self.sparse[block] if block < len(self.sparse) else model.layers - 1
        seconds = 0.0
        for layer in range(first, last + 1):
            seconds += sum(self.kernels.attention(model.order[layer], unit) for unit in units)
        if block == len(self.sparse):
            seconds += sum(self.kernels.head(unit) for unit in units)
        self.computing[device] = True
        self.busy_attention += seconds
        self.clock.after(seconds, partial(self._attended, device, block, units))

    def _attended(self, device: int, block: int, units: list[Batch]) -> None:
        self.computing[device] = False
        if block == len(self.sparse):
            self.under_way[device] -= len(units)
            for _ in units:
                self._admit(device)
        else:
            model = self.kernels.model
            tokens = sum(unit.tokens for unit in units)
            seconds = message_seconds(model, self.cluster, tokens, self.experts, model.itemsize)
            for unit in units:
                self.missing[id(unit), block] = model.experts
            for rank in range(self.experts):
                self.clock.after(seconds, partial(self._arrive, rank, block, units, device))
        self._attend(device)

    def _arrive(self, rank: int, block: int, units: list[Batch], device: int) -> None:
        model = self.kernels.model
        for unit in units:
            for column, expert in enumerate(self.owned[rank]):
                rows = unit.tokens * model.top_k / model.experts * self.shares[block][expert]
                self.queues[rank][block, column] += rows
                self.parts.setdefault((rank, block, column), []).append((unit, device, rows))
        self._serve(rank)

    def _serve(self, rank: int) -> None:
        queues = self.queues[rank]
        if self.serving[rank] or not queues.any():
            return
        block, column = divmod(int(defragging_scores(queues).argmax()), queues.shape[1])
        queues[block, column] = 0.0
        parts = self.parts.pop((rank, block, column))
        rows = sum(part for _, _, part in parts)
        seconds = self.kernels.experts(self.kernels.model.order[self.sparse[block]], rows, 1)
        self.serving[rank] = True
        self.busy_experts += seconds
        self.rows += rows
        self.launches += 1
        self.clock.after(seconds, partial(self._served, rank, block, parts))

    def _served(self, rank: int, block: int, parts: list[tuple[Batch, int, float]]) -> None:
        self.serving[rank] = False
        link = self.cluster.inside if self.experts < self.cluster.per_node else self.cluster.between
        for unit, device, rows in parts:
            seconds = link.latency + rows * self.kernels.model.hidden * 2 / link.bandwidth
            self.clock.after(seconds, partial(self._reply, unit, block, device))
        self._serve(rank)

    def _reply(self, unit: Batch, block: int, device: int) -> None:
        key = id(unit), block
        self.missing[key] -= 1
        if not self.missing[key]:
            del self.missing[key]
            self.at_block[device].setdefault(block + 1, []).append(unit)
            self._attend(device)
