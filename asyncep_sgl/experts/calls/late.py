"""Experts whose rows did not come back in time: fetched here after all, so that the answer is the same."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from asyncep_kernels.moe.table import ExpertTable
from asyncep_sgl.experts.gather.gather import Counters, GatheredLayer, PartialSource, slot_table
from asyncep_sgl.experts.gather.pipeline import Fetch


class LateExperts:
    """One slot for the missing experts of one layer at a time. For one thread.

    Args:
        layers: those that this host lacks experts of.
        source: where from.
    """

    def __init__(self, layers: Sequence[GatheredLayer], source: PartialSource) -> None:
        self._layers = {entry.layer: entry for entry in layers}
        self._source = source
        # Not touched before it is needed: without `start`, as a rule it never is, and takes no memory.
        self._slot = torch.empty(1, max(entry.slot.nbytes for entry in layers), dtype=torch.uint8)
        self._holds: tuple[int, frozenset[int]] = (-1, frozenset())
        source.open(self._layers, self._slot)

    @property
    def counters(self) -> Counters:
        """What the source met."""
        return self._source.counters

    def table(self, layer: int, experts: Collection[int]) -> ExpertTable:
        """``layer`` with ``experts``, valid until another layer is asked for. Waits as long as it takes.

        Raises:
            GatherError: what comes is, again and again, not what its owner says it wrote.
        """
        held = self._holds[1] if self._holds[0] == layer else frozenset()
        if more := sorted(frozenset(experts) - held):
            self._holds = (layer, held)
            self._source.start(layer, 0, more).wait()
            self._holds = (layer, held | frozenset(more))
        return slot_table(self._layers[layer], self._slot[0])

    def start(self, layer: int) -> Fetch:
        """Begins to fetch all missing experts of ``layer``; what was held before is lost."""
        self._holds = (-1, frozenset())
        return self._source.start(layer, 0)
