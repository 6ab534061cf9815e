"""Experts in this host's memory: fetched by a copy engine over PCIe, several layers ahead. Has not run on a GPU.

The memory is the host's expert store, which every rank maps; each rank pins the mapping for its own device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from asyncep_sgl.experts.gather.device import Copy, Device
from asyncep_sgl.experts.gather.device_source import DeviceSource
from asyncep_sgl.experts.shard.layout import runs


class PinnedSource(DeviceSource):
    """A `gather.LayerSource` over layers whose ``(experts, ...)`` tensors lie in host memory, whole.

    Args:
        device: this rank's.
        host: the host's tensor of a layer and name.
    """

    def __init__(self, device: Device, host: Callable[[int, str], torch.Tensor]) -> None:
        # One side stream: a host link has one direction to fill, and a second would fetch a later layer's bytes first.
        super().__init__(device, lanes=1)
        self._host = host

    def attach(self) -> None:
        """Raises `GatherError` if the memory cannot be pinned."""
        for layer, entry in self.layers.items():
            for name in entry.slot.strides:
                self.device.pin(self._host(layer, name))

    def work(self, layer: int, slot: int, lanes: int) -> list[Any]:
        """See `DeviceSource`."""
        entry = self.layers[layer].slot
        copies = []
        for name, stride in entry.strides.items():
            flat = self._host(layer, name).view(-1).view(torch.uint8)
            for run in runs(frozenset(entry.experts)):
                target, nbytes = entry.offset(name, run.start), len(run) * stride
                source = flat[run.start * stride : run.start * stride + nbytes]
                copies.append(Copy(self.slots[slot, target : target + nbytes], source))
        return [self.device.prepare(copies)]
