"""One rank's side of the expert store where ranks compute on devices: experts in the devices' memory, or the host's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from asyncep_sgl.errors import StoreError
from asyncep_sgl.experts.shard.checkpoint import OwnedWeights
from asyncep_sgl.experts.shard.holdings import MoeLayer, device_layout
from asyncep_sgl.experts.shard.layout import GroupLayout
from asyncep_sgl.experts.shard.manager import ExpertManager, SharedTensor, whole_tensor
from asyncep_sgl.experts.sources.cuda import Shard
from asyncep_sgl.experts.sources.device_memory import CudaMemory, DeviceMemory, Piece
from asyncep_sgl.experts.store.handles import HandleClient
from asyncep_sgl.experts.store.messages import Done, Placed, Segment


def _cuda_memory(device: torch.device) -> DeviceMemory:
    return CudaMemory(device.index if device.index is not None else torch.cuda.current_device())


@dataclass
class DeviceExpertManager(ExpertManager):
    """Each rank keeps its part of every layer in its device's memory, as a host does in a group of hosts.

    A parameter stays one ``(experts, ...)`` tensor: its addresses are reserved whole, and only the owned run has
    memory. The launcher holds a descriptor of that memory, so a rank that is started again finds it.

    Attributes:
        memory_of: a device's memory.
    """

    memory_of: Callable[[torch.device], DeviceMemory] = _cuda_memory
    _memory: DeviceMemory | None = None
    _mapped: list[torch.Tensor] = field(default_factory=list)

    def owned(self, layer: int) -> frozenset[int]:
        """Experts of ``layer`` this rank keeps."""
        layout = self.layouts.get(layer)
        return layout.held(layer, self.rank) if layout else frozenset()

    def missing(self, layer: int) -> frozenset[int]:
        """Experts of ``layer`` that other ranks keep."""
        return self.layouts[layer].missing(layer, self.rank)

    def adopt(self, layer: int, experts: int, parameters: dict[str, torch.nn.Parameter]) -> None:
        """See `ExpertManager`; ``parameters`` are on this rank's device."""
        this = MoeLayer(layer, experts, sum(parameter.nbytes for parameter in parameters.values()))
        layout = self.layouts[layer] = device_layout(self.group, self.ranks, self._built, this)
        self._built.append(this)
        for name, parameter in parameters.items():
            spec = whole_tensor(layer, name, parameter, experts)
            if self._memory is None:
                self._memory = self.memory_of(parameter.device)
            owned = _run(layout, layer, self.rank)
            pieces = []
            if owned:
                offset, nbytes = _span(owned, spec.nbytes // experts, self._memory.granularity)
                pieces = [Piece(offset, nbytes, self._descriptor(layer, name, nbytes))]
            flat = self._memory.map(spec.nbytes, pieces, writable=True)
            for piece in pieces:
                os.close(piece.descriptor)
            self._mapped.append(flat)
            parameter.data = flat.view(parameter.dtype).view(parameter.shape)
            self._tensors[layer, name] = SharedTensor(parameter, Segment("", spec.nbytes))
            self.client.ask(Placed(self.rank, spec, len(owned), len(owned) * (spec.nbytes // experts)), Done)

    def shards(self) -> dict[tuple[int, int, str], Shard]:
        """The other ranks' experts, mapped read-only for this rank's device. After `finish`.

        Raises:
            StoreError: a rank has not handed its memory in, or it cannot be mapped.
        """
        found = {}
        handles = HandleClient(self.address)
        for (layer, name), shared in self._tensors.items():
            layout = self.layouts[layer]
            if layer in layout.resident:
                continue
            stride = shared.segment.nbytes // layout.experts
            for rank in range(self.ranks):
                run = _run(layout, layer, rank)
                if rank == self.rank or not run or self._memory is None:
                    continue
                given = handles.withdraw(_key(rank, layer, name))
                if given is None:
                    raise StoreError(f"rank {rank} has handed in no memory for {name} of layer {layer}; see its log")
                descriptor, _ = given
                offset, nbytes = _span(run, stride, self._memory.granularity)
                flat = self._memory.map(nbytes, [Piece(0, nbytes, descriptor)], writable=False)
                os.close(descriptor)
                start = run.start * stride - offset
                found[rank, layer, name] = Shard(run, flat[start : start + len(run) * stride])
        return found

    def _descriptor(self, layer: int, name: str, nbytes: int) -> int:
        """Of this rank's own memory: what it left behind, or new."""
        handles = HandleClient(self.address)
        key = _key(self.rank, layer, name)
        if self.shard_present:
            given = handles.withdraw(key)
            if given is None or given[1] != nbytes:
                raise StoreError(f"the launcher has {given} for {key}, want {nbytes} bytes; restart asyncep serve")
            return given[0]
        if self._memory is None:
            raise StoreError("no device yet")
        descriptor = self._memory.allocate(nbytes)
        handles.deposit(key, descriptor, nbytes)
        return descriptor

    def _protect(self) -> None:
        if self._memory is not None:
            for flat in self._mapped:
                self._memory.protect(flat)


@dataclass
class PinnedExpertManager(ExpertManager):
    """Experts in the host's memory, once for all ranks; the first layers, as many as fit, on each device instead.

    ``group.memory_limit`` is what the device may keep. The mapping stays writable: CUDA pins no other without a
    capability that few devices have.
    """

    _on_device: dict[int, int] = field(default_factory=dict)
    _limit: int = 0

    def __post_init__(self) -> None:
        self._limit = self.group.memory_limit or 0
        self.group = replace(self.group, memory_limit=None)

    def owned(self, layer: int) -> frozenset[int]:
        """Experts this rank reads from the checkpoint: all of a layer that stays on its device."""
        if layer in self._on_device:
            return frozenset(range(self._on_device[layer]))
        return super().owned(layer)

    def missing(self, layer: int) -> frozenset[int]:
        """Experts that are not on the device."""
        return frozenset(range(self.layouts[layer].experts))

    def adopt(self, layer: int, experts: int, parameters: dict[str, torch.nn.Parameter]) -> None:
        """See `ExpertManager`; parameters of layers that stay on the device are left as they are."""
        nbytes = sum(parameter.nbytes for parameter in parameters.values())
        if not self.layouts and nbytes <= self._limit:
            self._limit -= nbytes
            self._on_device[layer] = experts
            return
        super().adopt(layer, experts, parameters)

    def weights(self) -> OwnedWeights:
        """See `ExpertManager`: what is on the device alone is read again by a rank that starts again."""
        owned = OwnedWeights(
            lambda layer: frozenset() if self.shard_present and layer not in self._on_device else self.owned(layer)
        )
        self._weights.append(owned)
        return owned

    def _protect(self) -> None:
        """Leaves the mapping writable."""


def _run(layout: GroupLayout, layer: int, rank: int) -> range:
    """A rank's experts, which are one run as there is one copy of each."""
    owned = sorted(layout.held(layer, rank))
    return range(owned[0], owned[-1] + 1) if owned else range(0)


def _span(run: range, stride: int, granularity: int) -> tuple[int, int]:
    """(offset, bytes) of the whole granules that a run of experts lies in."""
    start = run.start * stride // granularity * granularity
    return start, -(-run.stop * stride // granularity) * granularity - start


def _key(rank: int, layer: int, name: str) -> str:
    return f"{rank}/{layer}/{name}"
