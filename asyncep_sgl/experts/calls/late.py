"""Experts whose rows did not come back in time: fetched here after all, so that the answer is the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asyncep_kernels.moe.table import ExpertTable
from asyncep_sgl.experts.gather.gather import Counters, GatheredLayer, LayerSource, slot_table


class LateExperts:
    """One slot for the missing experts of one layer at a time. For one thread.

    Args:
        layers: those that this host lacks experts of.
        source: where from.
    """

    def __init__(self, layers: Sequence[GatheredLayer], source: LayerSource) -> None:
        self._layers = {entry.layer: entry for entry in layers}
        self._source = source
        # Not touched before it is needed: as a rule it never is, and takes no memory.
        self._slot = torch.empty(1, max(entry.slot.nbytes for entry in layers), dtype=torch.uint8)
        self._holds: int | None = None
        source.open(self._layers, self._slot)

    @property
    def counters(self) -> Counters:
        """What the source met."""
        return self._source.counters

    def table(self, layer: int) -> ExpertTable:
        """All experts of ``layer``, valid until another layer is asked for. Waits as long as it takes.

        Raises:
            GatherError: what comes is, again and again, not what its owner says it wrote.
        """
        if self._holds != layer:
            self._holds = None
            self._source.start(layer, 0).wait()
            self._holds = layer
        return slot_table(self._layers[layer], self._slot[0])
