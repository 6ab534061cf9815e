"""One rank's side of the expert store: shares expert tensors, loads its shard, waits for the rest."""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from dataclasses import dataclass, field

import torch

from asyncep_sgl.config.run import GroupConfig
from asyncep_sgl.errors import StoreError
from asyncep_sgl.experts.shard.checkpoint import OwnedWeights
from asyncep_sgl.experts.shard.digest import digest
from asyncep_sgl.experts.shard.holdings import MoeLayer, host_layout
from asyncep_sgl.experts.shard.layout import GroupLayout, runs
from asyncep_sgl.experts.store.client import StoreClient
from asyncep_sgl.experts.store.messages import (
    Allocate,
    Complete,
    Done,
    ExpertDigest,
    Failed,
    Hello,
    Loaded,
    Segment,
    TensorSpec,
    Welcome,
)
from asyncep_sgl.process.segment import map_segment


@dataclass
class SharedTensor:
    """A parameter, and the memory its experts lie in."""

    parameter: torch.nn.Parameter
    segment: Segment


@dataclass
class ExpertManager:
    """Experts of one model on one rank.

    Order of calls: `adopt` for every layer while the model is built, `weights` while it loads, `finish` once.

    Attributes:
        rank: this rank, within its host.
        ranks: ranks of this host.
        group: the hosts the experts are spread over; this one alone by default.
        shard_present: this rank's experts were in the store already; loading skips them.
    """

    rank: int
    ranks: int
    address: str
    client: StoreClient
    group: GroupConfig = field(default_factory=GroupConfig)
    shard_present: bool = False
    layouts: dict[int, GroupLayout] = field(default_factory=dict)
    sealed: bool = False
    # Layers are built in order.
    _built: list[MoeLayer] = field(default_factory=list)
    _tensors: dict[tuple[int, str], SharedTensor] = field(default_factory=dict)
    _weights: list[OwnedWeights] = field(default_factory=list)

    @classmethod
    def join(cls, rank: int, ranks: int, address: str, group: GroupConfig | None = None) -> ExpertManager:
        """Says hello to the store's owner.

        Raises:
            StoreError: it does not answer or does not know this rank.
        """
        client = StoreClient(address)
        welcome = client.ask(Hello("rank", os.getpid(), rank), Welcome)
        return cls(rank, ranks, address, client, group or GroupConfig(), welcome.shard_present)

    def owned(self, layer: int) -> frozenset[int]:
        """Experts of ``layer`` this rank reads from the checkpoint; none in a layer without experts."""
        layout = self.layouts.get(layer)
        return layout.read_by(layer, self.group.node, self.rank) if layout else frozenset()

    def missing(self, layer: int) -> frozenset[int]:
        """Experts of ``layer`` that are not in this host's memory."""
        return self.layouts[layer].missing(layer, self.group.node)

    def parameters(self, layer: int) -> dict[str, torch.nn.Parameter]:
        """The layer's expert parameters by name, each ``(experts, ...)``. Rows of `missing` experts hold nothing."""
        return {name: shared.parameter for (at, name), shared in self._tensors.items() if at == layer}

    def adopt(self, layer: int, experts: int, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Moves a layer's freshly made, not yet loaded expert parameters onto shared memory.

        Args:
            layer: decoder layer.
            experts: experts of the layer.
            parameters: each of shape ``(experts, ...)`` on the CPU; their contents are not kept.

        Raises:
            StoreError: a tensor that does not hold all experts, or no memory for it.
        """
        this = MoeLayer(layer, experts, sum(parameter.nbytes for parameter in parameters.values()))
        layout = self.layouts[layer] = host_layout(self.group, self.ranks, self._built, this)
        self._built.append(this)
        held = tuple((run.start, run.stop) for run in runs(layout.held(layer, self.group.node)))
        for name, parameter in parameters.items():
            spec = whole_tensor(layer, name, parameter, experts)
            segment = self.client.ask(Allocate(spec, held), Segment)
            self._tensors[layer, name] = SharedTensor(parameter, segment)
            parameter.data = _tensor_on(segment, parameter, writable=True)

    def weights(self) -> OwnedWeights:
        """A fresh pass over the checkpoint that reads only what this rank still has to put into the store."""
        owned = OwnedWeights(lambda layer: frozenset() if self.shard_present else self.owned(layer))
        self._weights.append(owned)
        return owned

    def refuse_if_sealed(self) -> None:
        """Guards the shared experts against being loaded over while every rank reads them.

        Raises:
            StoreError: the experts are already in service.
        """
        if self.sealed:
            raise StoreError(
                "the experts are shared by all ranks and read-only; restart asyncep serve to change weights"
            )

    def report_failure(self, error: Exception) -> None:
        """Tells the launcher why this rank ends, if it still listens."""
        lines = str(error).splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        # A line of its own: the error may have come in the middle of a question on the first.
        line = StoreClient(self.address)
        with contextlib.suppress(StoreError):
            line.ask(Failed(self.rank, reason), Done, patience=1.0)
        line.close()

    def finish(self) -> None:
        """Tells the owner that the shard is written, waits until every rank's is, and makes the experts read-only.

        Read-only in hardware: a stray write by one rank would change every rank's answers.

        Raises:
            StoreError: no layer had experts, or the launcher refused.
        """
        if not self._tensors:
            raise StoreError("the model has no experts to share; serve a dense model with sglang's own server")
        experts = sum(len(self.owned(layer)) for layer in self.layouts)
        expert_bytes = 0
        for (layer, _), shared in self._tensors.items():
            per_expert = shared.segment.nbytes // self.layouts[layer].experts
            expert_bytes += per_expert * len(self.owned(layer))
        report = Loaded(
            rank=self.rank,
            experts=experts,
            expert_bytes=expert_bytes,
            bytes_read=sum(weights.count.read for weights in self._weights),
            bytes_skipped=sum(weights.count.skipped for weights in self._weights),
            digests=self._digests() if self.group.nodes > 1 else (),
        )
        # Another rank may read a large shard from slow storage: no deadline, the launcher's end ends the wait.
        self.client.ask(report, Complete, patience=None)
        self._protect()
        self.sealed = True

    def _protect(self) -> None:
        for shared in self._tensors.values():
            shared.parameter.data = _tensor_on(shared.segment, shared.parameter, writable=False)

    def _digests(self) -> tuple[ExpertDigest, ...]:
        return tuple(
            ExpertDigest(layer, name, expert, digest(shared.parameter.data[expert]))
            for (layer, name), shared in self._tensors.items()
            for expert in sorted(self.owned(layer))
        )


def whole_tensor(layer: int, name: str, parameter: torch.Tensor, experts: int) -> TensorSpec:
    """The store's word for a parameter.

    Raises:
        StoreError: it does not hold all experts.
    """
    if parameter.shape[0] != experts:
        raise StoreError(
            f"{name} of layer {layer} holds {parameter.shape[0]} of {experts} experts; expert and tensor "
            "parallelism divide them, use --tp-size 1 --ep-size 1"
        )
    dtype = str(parameter.dtype).removeprefix("torch.")
    return TensorSpec(layer, name, tuple(parameter.shape), dtype, parameter.nbytes)


def _tensor_on(segment: Segment, like: torch.Tensor, *, writable: bool) -> torch.Tensor:
    memory: mmap.mmap = map_segment(segment.path, segment.nbytes, writable=writable)
    with warnings.catch_warnings():
        # torch warns that a read-only buffer could be written through the tensor: here that faults, as meant.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)
