"""ASAP (arXiv 2606.22541): attention groups and expert ranks on separate devices, first come, first served.

Each attention device interleaves two batches (one above `INTERLEAVE_TOKENS`): while one's experts are computed
elsewhere it does the other's attention. An expert rank serves messages in order of arrival, whatever layer they are
of (the layer-agnostic kernel). A sender's two static buffers at each receiver are the backpressure: a device never has
more than two batches under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

from asyncep.sim.hardware import Cluster
from asyncep.sim.kernels import Kernels
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.strategies.disaggregated import Backlog, Clock, message_seconds
from asyncep.sim.work import Batch

INTERLEAVE_TOKENS = 16_384


class Asap:
    """`attention` devices and `experts` devices of a cluster, kernels and skew as elsewhere."""

    def __init__(self, kernels: Kernels, cluster: Cluster, attention: int, experts: int, skew: ExpertSkew) -> None:
        self.kernels = kernels
        self.cluster = cluster
        self.attention = attention
        self.experts = experts
        self.skew = skew

    def run(self, batches: Sequence[Batch]) -> Backlog:
        """Work off batches that all wait at the start."""
        model = self.kernels.model
        self.clock = Clock()
        self.waiting = deque(batches)
        self.ready: list[deque[tuple[Batch, int]]] = [deque() for _ in range(self.attention)]
        self.computing = [False] * self.attention
        self.under_way = [0] * self.attention
        self.inbox: list[deque[tuple[Batch, int, int]]] = [deque() for _ in range(self.experts)]
        self.serving = [False] * self.experts
        self.missing: dict[tuple[int, int], int] = {}
        self.busy_attention = self.busy_experts = self.rows = 0.0
        self.launches = 0
        for device in range(self.attention):
            self._admit(device)
        for device in range(self.attention):  # each has one before any has two
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
            rows=self.rows / model.sparse_layers if model.sparse_layers else 0.0,
        )

    def _admit(self, device: int) -> None:
        if not self.waiting:
            return
        limit = 1 if self.waiting[0].tokens > INTERLEAVE_TOKENS else 2
        if self.under_way[device] < limit:
            self.under_way[device] += 1
            self.ready[device].append((self.waiting.popleft(), 0))
            self._attend(device)

    def _attend(self, device: int) -> None:
        if self.computing[device] or not self.ready[device]:
            return
        batch, layer = self.ready[device].popleft()
        model = self.kernels.model
        seconds = 0.0
        # Layers without experts never leave the device.
        while layer < model.layers:
            kind = model.order[layer]
            seconds += self.kernels.attention(kind, batch)
            if model.kinds[kind].shape.mlp.experts:
                break
            layer += 1
        if layer == model.layers:
            seconds += self.kernels.head(batch)
        self.computing[device] = True
        self.busy_attention += seconds
        self.clock.after(seconds, partial(self._attended, device, batch, layer))

    def _attended(self, device: int, batch: Batch, layer: int) -> None:
        self.computing[device] = False
        model = self.kernels.model
        if layer == model.layers:
            self.under_way[device] -= 1
            self._admit(device)
        else:
            self.missing[id(batch), layer] = self.experts
            seconds = message_seconds(model, self.cluster, batch.tokens, self.experts, model.itemsize)
            for rank in range(self.experts):
                self.clock.after(seconds, partial(self._arrive, rank, batch, layer, device))
        self._attend(device)

    def _arrive(self, rank: int, batch: Batch, layer: int, device: int) -> None:
        self.inbox[rank].append((batch, layer, device))
        self._serve(rank)

    def _serve(self, rank: int) -> None:
        if self.serving[rank] or not self.inbox[rank]:
            return
        batch, layer, device = self.inbox[rank].popleft()
        model = self.kernels.model
        mlp = model.kinds[model.order[layer]].shape.mlp
        rows = batch.tokens * mlp.top_k / self.experts * self.skew.loads(mlp.experts, self.experts, layer)[rank]
        seconds = self.kernels.experts(model.order[layer], rows, mlp.experts / self.experts)
        self.serving[rank] = True
        self.busy_experts += seconds
        self.rows += rows
        self.launches += 1
        self.clock.after(seconds, partial(self._served, rank, batch, layer, device))

    def _served(self, rank: int, batch: Batch, layer: int, device: int) -> None:
        self.serving[rank] = False
        seconds = message_seconds(self.kernels.model, self.cluster, batch.tokens / self.experts, self.experts, 2)
        self.clock.after(seconds, partial(self._reply, batch, layer, device))
        self._serve(rank)

    def _reply(self, batch: Batch, layer: int, device: int) -> None:
        key = id(batch), layer
        self.missing[key] -= 1
        if not self.missing[key]:
            del self.missing[key]
            self.ready[device].append((batch, layer + 1))
            self._attend(device)
