"""Experts in other GPUs of this host: pulled by copy engines out of the peers' mapped memory. Has not run on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from asyncep_sgl.errors import GatherError
from asyncep_sgl.experts.gather.device import Copy, Device
from asyncep_sgl.experts.gather.device_source import DeviceSource
from asyncep_sgl.experts.gather.plan import choose, pieces
from asyncep_sgl.experts.gather.slices import SLICE_BYTES, slices


class Shard(NamedTuple):
    """A peer's experts of one tensor, mapped into this process.

    ``data``: uint8 ``(experts * stride,)``, the experts of ``experts`` one after the other.
    """

    experts: range
    data: torch.Tensor


class CudaSource(DeviceSource):
    """A `gather.LayerSource` over the shards of other ranks on this host.

    Args:
        device: this rank's.
        shards: by (rank, layer, tensor).
        rank, ranks: this one, and how many there are.
        lanes: side streams.
        slice_bytes: of the largest copy.
    """

    def __init__(
        self,
        device: Device,
        shards: Mapping[tuple[int, int, str], Shard],
        *,
        rank: int,
        ranks: int,
        lanes: int = 1,
        slice_bytes: int = SLICE_BYTES,
    ) -> None:
        super().__init__(device, lanes)
        self._shards = shards
        self._rank = rank
        self._ranks = ranks
        self._slice_bytes = slice_bytes

    def attach(self) -> None:
        """Raises `GatherError` if a missing expert is in no shard, or a shard has another size than it should."""
        for layer, entry in self.layers.items():
            self._chosen(layer)
            for (rank, at, name), shard in self._shards.items():
                if at == layer and shard.data.nbytes != len(shard.experts) * entry.slot.strides[name]:
                    raise GatherError(
                        f"rank {rank} shares {shard.data.nbytes} bytes of {name} in layer {layer} for "
                        f"{len(shard.experts)} experts of {entry.slot.strides[name]}; start every rank with the same "
                        "model and --dtype"
                    )

    def work(self, layer: int, slot: int, lanes: int) -> list[Any]:
        """See `DeviceSource`."""
        entry = self.layers[layer]
        cut = slices(pieces(entry.slot, self._chosen(layer)), self._rank, self._ranks, self._slice_bytes)
        copies = []
        for part in cut:
            shard = self._shards[part.node, layer, part.name]
            start = (part.expert - shard.experts.start) * entry.slot.strides[part.name] + part.source
            target = self.slots[slot, part.target : part.target + part.nbytes]
            copies.append(Copy(target, shard.data[start : start + part.nbytes]))
        return [self.device.prepare(copies[lane::lanes]) for lane in range(lanes)]

    def _chosen(self, layer: int) -> dict[int, frozenset[int]]:
        entry = self.layers[layer]
        name = min(entry.slot.strides)
        holders = {
            rank: frozenset(s.experts) for (rank, at, of), s in self._shards.items() if (at, of) == (layer, name)
        }
        chosen = choose(entry.slot.experts, holders, self._rank, self._ranks)
        if chosen is None:
            raise GatherError(f"rank {self._rank} finds no shard with every missing expert of layer {layer}")
        return chosen
