"""Gathers into a device's slots: copies on side streams, ordered against the forward pass by events alone.

Three orders are kept, on the device:

- copies into a slot begin after everything that was queued on the forward pass's stream when they were asked for;
  `GatherPipeline` asks for a slot only after the layer in it has been queued whole (read, then overwritten);
- copies into a slot begin after all earlier copies into it, on whichever side stream (given up, then fetched anew);
- the forward pass reads a slot after all copies into it (written, then read).

The host never waits for any of it. So the first two also make `cancel` free: nothing has to have ended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncep_sgl.errors import GatherError
from asyncep_sgl.experts.gather.device import Device, Event, Stream
from asyncep_sgl.experts.gather.gather import Counters, GatheredLayer


@dataclass(frozen=True)
class DeviceTimes:
    """One layer's gather by the device's clock; see `pipeline.Timing`. Reading a figure waits for its events.

    Attributes:
        begun, done: around the copies, on each side stream.
        reached, resumed: around the wait, on the forward pass's stream.
    """

    device: Device
    begun: Sequence[Event]
    done: Sequence[Event]
    reached: Event
    resumed: Event
    exact: bool = True

    @property
    def seconds(self) -> float:
        """How long the slowest side stream copied."""
        pairs = zip(self.begun, self.done, strict=True)
        return max(self.device.seconds(begun, done) for begun, done in pairs)

    @property
    def exposed(self) -> float:
        """How long the forward pass stood still."""
        return self.device.seconds(self.reached, self.resumed)

    def window_until(self, later: DeviceTimes) -> float:
        """From the end of this wait to the beginning of a later one."""
        return self.device.seconds(self.resumed, later.reached)


class DeviceSource(ABC):
    """A `gather.LayerSource` that fills slots in a device's memory. For one thread.

    Args:
        device: where the slots are.
        lanes: side streams; a layer's copies are dealt over them.
    """

    def __init__(self, device: Device, lanes: int = 1) -> None:
        self.counters = Counters()
        self.device = device
        self.layers: Mapping[int, GatheredLayer] = {}
        self.slots = torch.empty(0)
        self._lanes: list[Stream] = [device.new_stream() for _ in range(lanes)]
        self._readers: list[Stream] = []
        self._written: dict[int, list[Event]] = {}
        self._work: dict[tuple[int, int], list[Any]] = {}

    def open(self, layers: Mapping[int, GatheredLayer], slots: torch.Tensor) -> None:
        """See `LayerSource`.

        Raises:
            GatherError: an expert is nowhere to be had.
        """
        self.layers, self.slots = layers, slots
        self.attach()

    def start(self, layer: int, slot: int) -> DeviceFetch:
        """See `LayerSource`. Never raises: what cannot be queued is told by the fetch's ``wait``."""
        self.forward_stream()
        read = [self.device.record(stream) for stream in self._readers]
        written = self._written.get(slot, [])
        begun: list[Event] = []
        done: list[Event] = []
        failure: GatherError | None = None
        try:
            if (layer, slot) not in self._work:
                self._work[layer, slot] = self.work(layer, slot, len(self._lanes))
            for lane, part in zip(self._lanes, self._work[layer, slot], strict=True):
                for event in (*read, *written):
                    self.device.wait(lane, event)
                begun.append(self.device.record(lane))
                try:
                    self.transfer(lane, part)
                finally:
                    done.append(self.device.record(lane))
        except GatherError as error:
            failure = error
        if done:
            # Each of these lanes has waited for all that was written before.
            self._written[slot] = done
        return DeviceFetch(self, begun, done, failure)

    def forward_stream(self) -> Stream:
        """The forward pass's stream; all that were ever used are remembered, as any may still read a slot."""
        stream = self.device.current_stream()
        if stream not in self._readers:
            self._readers.append(stream)
        return stream

    def close(self) -> None:
        """Waits until nothing writes to a slot any more."""
        for lane in self._lanes:
            self.device.synchronize(lane)

    @abstractmethod
    def attach(self) -> None:
        """Called once layers and slots are known. Raises `GatherError` if a missing expert is nowhere to be had."""

    @abstractmethod
    def work(self, layer: int, slot: int, lanes: int) -> list[Any]:
        """What fills ``slot`` with ``layer``, a part a lane. Kept and used again."""

    def transfer(self, lane: Stream, part: Any) -> None:
        """Queues a part. Raises `GatherError`."""
        self.device.copy(lane, part)


@dataclass(frozen=True)
class DeviceFetch:
    """See `pipeline.Fetch`."""

    source: DeviceSource
    begun: Sequence[Event]
    done: Sequence[Event]
    failure: GatherError | None

    def wait(self) -> DeviceTimes:
        """See `pipeline.Fetch`: what is queued from now on begins when the slot holds the layer."""
        if self.failure is not None:
            raise self.failure
        device = self.source.device
        stream = self.source.forward_stream()
        reached = device.record(stream)
        for event in self.done:
            device.wait(stream, event)
        return DeviceTimes(device, self.begun, self.done, reached, device.record(stream))

    def over(self) -> bool:
        """See `pipeline.Fetch`."""
        return True

    def cancel(self) -> None:
        """See `pipeline.Fetch`: later copies into the slot are queued behind these."""
