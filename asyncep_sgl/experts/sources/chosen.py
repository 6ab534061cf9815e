"""A source that brings of each layer what somebody chooses when its fetch begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from asyncep_sgl.experts.gather.gather import Counters, GatheredLayer, InParts, PartialSource


class ChosenExperts:
    """A `gather.LayerSource`.

    Args:
        source: where from.
        choose: which of a layer's missing experts are fetched now, in the order in which they are to come.

    Attributes:
        choosing: False fetches everything, so that a whole gather can be measured.
    """

    def __init__(self, source: PartialSource, choose: Callable[[int], Sequence[int]]) -> None:
        self._source = source
        self._choose = choose
        self.choosing = False

    @property
    def counters(self) -> Counters:
        """What the source met."""
        return self._source.counters

    def open(self, layers: Mapping[int, GatheredLayer], slots: torch.Tensor) -> None:
        """See `LayerSource`."""
        self._source.open(layers, slots)

    def start(self, layer: int, slot: int) -> InParts:
        """See `LayerSource`."""
        return self._source.start(layer, slot, self._choose(layer) if self.choosing else None)
