"""A rank that gathers: its slots, its books, and its line to the launcher that passes them on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from asyncep_kernels.workspace import Workspace
from asyncep_sgl.errors import StoreError
from asyncep_sgl.experts.gather.gather import Counters, ExpertGather, InParts
from asyncep_sgl.experts.gather.log import GatherBook
from asyncep_sgl.experts.start import start_gather
from asyncep_sgl.strategies.base import ExpertLayer, RankPlace, RankStrategy, TopK
from asyncep_sgl.strategies.layer_rows import LayerRows

if TYPE_CHECKING:
    import torch

    from asyncep_kernels.moe.table import ExpertTable

_REPORT_SECONDS = 1.0
# The first batches are those that T is measured with: each is told at once.
_FIRST_BATCHES = 16


class AsyncEPRank(RankStrategy):
    """Computes each layer on a table of what lies in the store and what was gathered into a slot."""

    def __init__(self, place: RankPlace) -> None:
        super().__init__(place)
        self._tables: dict[int, ExpertTable] = {}
        # Of hosts, where a layer's experts come in parts; a device waits for all of them.
        self._coming: InParts | None = None
        self._workspace = Workspace()
        self._gather: ExpertGather | None = None
        self._book: GatherBook | None = None
        self._floor = float(place.cost.flops(place.config.settings.threshold_tokens))
        self._reported = 0.0
        self._told = Counters()

    def loaded(self) -> None:
        """Every rank of the host has written its shard: waits for the other hosts, connects to them and measures."""
        super().loaded()
        place = self.place
        started = start_gather(
            place.experts,
            place.config.group,
            place.folder(),
            len(place.cost.shape.layers),
            place.config.group.log_gathers,
            device=place.device(),
        )
        if (started is not None) != place.config.group.gathers:
            expected, found = ("something", "nothing") if place.config.group.gathers else ("nothing", "something")
            raise StoreError(
                f"rank {place.rank} finds {found} to gather and the launcher expected {expected}: the layers' sizes "
                "are not those of the model's configuration; give --dtype, and another --asyncep-expert-memory"
            )
        if started is None:
            return
        self._gather, self._book = started
        self.told = frozenset(self._gather.layers)
        self.batch_flops = self._target
        self._report(self._gather, self._book)

    def in_place(self, layer: int) -> bool:
        """Whether a layer is kept whole."""
        return layer not in self.told

    def moe(self, layer: ExpertLayer, hidden: torch.Tensor, topk: TopK) -> torch.Tensor:
        """See `RankStrategy`. Experts that are there compute while others come."""
        if layer.index not in self.told:
            return layer.compute(hidden, topk, layer.own)
        table = self._tables[layer.index]
        if self._coming is None or self._gather is None or not topk.ids.numel():
            return layer.compute(hidden, topk, table)
        rows = LayerRows(hidden, topk, table, self._workspace)
        to_come = [part for part in self._coming.parts if not part.there()]
        late = {expert for part in to_come for expert in part.experts}
        rows.compute([expert for expert in range(len(table.w13)) if expert not in late], table)
        exposed = 0.0
        for part in to_come:
            began = time.monotonic()
            part.wait()
            exposed += time.monotonic() - began
            rows.compute(part.experts, table)
        self._gather.pipeline.waited(exposed, self._coming.wait())
        return rows.combined()

    def pass_begins(self) -> None:
        """Fetches begin."""
        if self._gather is not None:
            self._gather.begin()

    def layer_begins(self, layer: int) -> None:
        """Waits for the layer's experts, or takes what has come of them."""
        if self._gather is None:
            return
        if self.place.config.group.nodes > 1:
            self._tables[layer], self._coming = self._gather.take(layer)
        else:
            self._tables[layer] = self._gather.wait(layer)

    def layer_ended(self, layer: int) -> None:
        """Gives the layer's slot to a later one."""
        if self._gather is not None:
            del self._tables[layer]
            self._gather.release(layer)

    def batch_done(self, passes: Sequence[tuple[int, int]], seconds: float) -> None:
        """Learns the compute window from it."""
        if self._gather is None or self._book is None:
            return
        trace = self._gather.take_trace()
        # Read before this batch can change it: batches are formed and computed in turn, so this one was cut at it.
        target = self._target()
        self._book.batch(trace, float(self.place.cost.batch_flops(list(passes))), seconds, target)
        # What went wrong is told at once: the next batch on this rank may be long in coming.
        news = self._gather.counters != self._told or self._book.batches <= _FIRST_BATCHES
        if news or time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._report(self._gather, self._book)

    def close(self) -> None:
        """Ends the fetches."""
        if self._gather is not None:
            self._gather.pipeline.close()

    def _target(self) -> float:
        """FLOPs that a batch should cost: T, or what computes well where that is more."""
        assert self._book is not None
        return max(self.place.cost.threshold_flops(self._book.threshold()), self._floor)

    def _report(self, gather: ExpertGather, book: GatherBook) -> None:
        self._reported = time.monotonic()
        counters = self._told = replace(gather.counters)
        self.place.tell_threshold(book.threshold())
        self.place.experts.client.tell(book.report(counters.digest_failures, counters.peer_losses))
