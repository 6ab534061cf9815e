"""One rank's gathers: slots of memory, filled by a source in the pipeline's order, and tables of what lies where."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from asyncep_kernels.moe.table import ExpertTable
from asyncep_sgl.experts.gather.pipeline import Fetch, Gathered, GatherPipeline, LayerTrace
from asyncep_sgl.experts.gather.plan import SlotLayout

_PAGE = 4096
# Batches whose traces are kept until they are asked for; an overlapping scheduler is one batch ahead.
_TRACES = 4


@dataclass
class Counters:
    """What went wrong and was repeated."""

    digest_failures: int = 0
    peer_losses: int = 0


@dataclass
class GatheredLayer:
    """What one layer's gather needs to know.

    Attributes:
        layer: the decoder layer.
        parameters: the store's ``(experts, ...)`` tensors by name; rows of missing experts hold nothing.
        slot: where the missing experts lie in a slot.
    """

    layer: int
    parameters: Mapping[str, torch.Tensor]
    slot: SlotLayout


def slot_layout(parameters: Mapping[str, torch.Tensor], missing: frozenset[int]) -> SlotLayout:
    """The slot of a layer with these tensors, each ``(experts, ...)``."""
    strides = {name: tensor[0].nbytes for name, tensor in parameters.items()}
    return SlotLayout(tuple(sorted(missing)), strides)


@runtime_checkable
class _OnDevice(Protocol):
    """`device_source.DeviceTimes`: of the device's clock, where the host has not waited for anything."""

    @property
    def seconds(self) -> float: ...

    @property
    def exposed(self) -> float: ...

    def window_until(self, later: _OnDevice, /) -> float: ...


class Part(Protocol):
    """Some experts of a layer that come together."""

    @property
    def experts(self) -> Sequence[int]: ...

    def there(self) -> bool:
        """Whether they are there, complete and checked."""

    def coming(self) -> bool:
        """Whether they are on their way, as far as is known. Neither there nor coming: something went wrong."""

    def wait(self) -> Gathered:
        """Returns once they are there, complete and checked. Raises as `pipeline.Fetch` does."""


@runtime_checkable
class InParts(Fetch, Protocol):
    """A `pipeline.Fetch` whose experts can be used part by part, in the order in which they come."""

    @property
    def parts(self) -> Sequence[Part]: ...

    def wait(self) -> Gathered:
        """For all of them."""


class LayerSource(Protocol):
    """Where missing experts come from: other hosts, other devices, host memory, or the checkpoint."""

    @property
    def counters(self) -> Counters: ...

    def open(self, layers: Mapping[int, GatheredLayer], slots: torch.Tensor) -> None:
        """Called once, before any `start`: fetches will be of ``layers`` into rows of ``slots``, ``(depth, bytes)``
        uint8. Returns when every missing expert can be had."""

    def start(self, layer: int, slot: int) -> Fetch:
        """Begins to fetch ``layer``'s missing experts into row ``slot``; returns at once."""


class PartialSource(Protocol):
    """A `LayerSource` that also brings some of a layer's missing experts."""

    @property
    def counters(self) -> Counters: ...

    def open(self, layers: Mapping[int, GatheredLayer], slots: torch.Tensor) -> None:
        """See `LayerSource`."""

    def start(self, layer: int, slot: int, experts: Sequence[int] | None = None) -> InParts:
        """``experts`` in the order in which they are to come; all that are missing by default."""


class ExpertGather:
    """Gathers missing experts, layer by layer, ahead of the computation. For one thread.

    Args:
        layers: those that gather anything, in the order they compute.
        source: where from.
        depth: slots.
        device: in whose memory the slots are.
    """

    def __init__(
        self, layers: Sequence[GatheredLayer], source: LayerSource, depth: int, device: torch.device | str = "cpu"
    ) -> None:
        self.layers = {entry.layer: entry for entry in layers}
        self._source = source
        extent = -(-max(entry.slot.nbytes for entry in layers) // _PAGE) * _PAGE
        # Touched now: the first gather should not pay for page faults.
        self._slots = torch.zeros(depth, extent, dtype=torch.uint8, device=device)
        self._traces: deque[list[LayerTrace]] = deque(maxlen=_TRACES)
        self._taken = True
        self._tables: dict[tuple[int, int], ExpertTable] = {}
        source.open(self.layers, self._slots)
        self.pipeline = GatherPipeline(list(self.layers), depth, source.start, time.monotonic)

    @property
    def counters(self) -> Counters:
        """What the source met."""
        return self._source.counters

    @property
    def slot_bytes(self) -> int:
        """Memory of all slots."""
        return int(self._slots.nbytes)

    def begin(self) -> None:
        """A batch is about to compute."""
        before = self.pipeline.trace()
        if before and not self._taken:
            self._traces.append(before)
        self._taken = False
        self.pipeline.begin()

    def take_trace(self) -> list[LayerTrace]:
        """What the oldest batch met whose trace has not been taken yet. On a device: once its results are there."""
        if self._traces:
            return _settled(self._traces.popleft())
        if self._taken:
            return []
        self._taken = True
        return _settled(self.pipeline.trace())

    def wait(self, layer: int) -> ExpertTable:
        """All experts of ``layer``, wherever they lie; valid until `release`. Blocks until they are there."""
        return self._table(layer, self.pipeline.wait(layer))

    def take(self, layer: int, *, patient: bool = True) -> tuple[ExpertTable, InParts | None]:
        """The same without waiting, for a source that brings a layer in parts.

        Args:
            patient: see `GatherPipeline.take`.

        Returns:
            The table, of which only what this host has and what parts have brought may be read; and what comes.
        """
        slot, fetch = self.pipeline.take(layer, patient=patient)
        return self._table(layer, slot), fetch if isinstance(fetch, InParts) else None

    def release(self, layer: int) -> None:
        """``layer`` has computed."""
        self.pipeline.release(layer)

    def _table(self, layer: int, slot: int) -> ExpertTable:
        if (layer, slot) not in self._tables:
            self._tables[layer, slot] = slot_table(self.layers[layer], self._slots[slot])
        return self._tables[layer, slot]

    def measure(self, rounds: int = 2) -> list[float]:
        """Seconds that gathers of single layers take with nothing else to do, a few layers ``rounds`` times each.

        To be called while nothing computes; the slots are empty afterwards.
        """
        self.pipeline.close()
        sample = list(self.layers)[:: max(1, len(self.layers) // 3)][:3]
        return [self._source.start(layer, 0).wait().seconds for _ in range(rounds) for layer in sample]


def slot_table(entry: GatheredLayer, slot: torch.Tensor) -> ExpertTable:
    """A layer's experts, wherever they lie: in the store, or in a slot that holds the missing ones.

    Args:
        slot: ``(bytes,)`` uint8.
    """
    missing = frozenset(entry.slot.experts)
    sides = {}
    for name, parameter in entry.parameters.items():
        rows = []
        for expert in range(parameter.shape[0]):
            if expert in missing:
                start = entry.slot.offset(name, expert)
                raw = slot[start : start + entry.slot.strides[name]]
                rows.append(raw.view(parameter.dtype).view(parameter.shape[1:]))
            else:
                rows.append(parameter[expert])
        sides[name] = rows
    return ExpertTable(sides["w13_weight"], sides["w2_weight"])


def _settled(trace: list[LayerTrace]) -> list[LayerTrace]:
    """With the figures of the device's clock in the place of the host's, which only queued the work."""
    found = []
    for at, entry in enumerate(trace):
        times = entry.gather
        if isinstance(times, _OnDevice):
            later = trace[at + 1].gather if at + 1 < len(trace) else None
            window = times.window_until(later) if isinstance(later, _OnDevice) else None
            entry = replace(entry, exposed=times.exposed, window=window, gather=Gathered(times.seconds, exact=True))
        found.append(entry)
    return found
