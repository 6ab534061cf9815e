"""A rank that sends rows: for each layer what it sends, what it computes meanwhile, and what if nobody answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from asyncep_kernels.moe import cpu
from asyncep_kernels.moe.stages import Sorted
from asyncep_kernels.workspace import Workspace
from asyncep_sgl.experts.calls.caller import Caller, Sent
from asyncep_sgl.experts.calls.late import LateExperts
from asyncep_sgl.experts.calls.owners import Asked, whom_to_ask
from asyncep_sgl.experts.group.view import ViewLine
from asyncep_sgl.experts.shard.layout import runs
from asyncep_sgl.experts.start import missing_layers, peer_source
from asyncep_sgl.experts.store.messages import CallReport, Done
from asyncep_sgl.strategies.base import ExpertLayer, RankPlace, RankStrategy, TopK

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger("asyncep")

_REPORT_SECONDS = 1.0
# At the start workers come a moment after the experts that they compute with.
_WORKER_SECONDS = 15.0


@dataclass(frozen=True)
class _Layer:
    """Where a layer's experts are: here, and on which other hosts."""

    experts: int
    own: tuple[range, ...]
    missing: frozenset[int]
    holders: Mapping[int, frozenset[int]]


class CallingRank(RankStrategy):
    """Computes the rows of its host's experts and sends the others."""

    def __init__(self, place: RankPlace) -> None:
        super().__init__(place)
        self._layers: dict[int, _Layer] = {}
        # By layer and by the hosts that may be asked, which are the same for hours.
        self._asked: dict[tuple[int, frozenset[int]], tuple[Asked, ...]] = {}
        self._workspace = Workspace()
        self._caller: Caller | None = None
        self._late: LateExperts | None = None
        self._fetched_rows = 0
        self._steps = 0.0
        self._report_at = 0.0
        self._wrong = (0, 0, 0)

    def loaded(self) -> None:
        """Every rank of the host has written its shard: waits for the other hosts, and for their workers a moment."""
        super().loaded()
        manager, group = self.place.experts, self.place.config.group
        layers = missing_layers(manager)
        if not layers:
            return
        for entry in layers:
            layout = manager.layouts[entry.layer]
            held = {node: layout.held(entry.layer, node) for node in range(group.nodes)}
            self._layers[entry.layer] = _Layer(
                layout.experts, runs(held[group.node]), layout.missing(entry.layer, group.node), held
            )
        self._late = LateExperts(layers, peer_source(manager, group))
        self._caller = Caller(ViewLine(group.exporter_address), verify=group.verify == "every")
        self._await_workers(self._caller)
        self._report()

    def in_place(self, layer: int) -> bool:
        """Whether a layer is kept whole."""
        return layer not in self._layers

    def moe(self, layer: ExpertLayer, hidden: torch.Tensor, topk: TopK) -> torch.Tensor:
        """See `RankStrategy`. The bits do not depend on who computes a row."""
        entry = self._layers.get(layer.index)
        if entry is None or self._caller is None or self._late is None or not topk.ids.numel():
            return layer.compute(hidden, topk, layer.own)
        order = cpu.sort(topk.ids, entry.experts, workspace=self._workspace)
        dtype = cpu.results_dtype(hidden, layer.own)
        results = self._workspace.take("calls.results", (topk.ids.numel(), hidden.shape[1]), dtype)
        sent, left = self._send(self._caller, layer.index, entry, hidden, order)
        for run in entry.own:
            cpu.run(hidden, order, layer.own, results, first=run.start, last=run.stop, workspace=self._workspace)
        left += [call.experts for call in self._caller.collect(sent, results)]
        if left:
            table = self._late.table(layer.index)
            for run in left:
                cpu.run(hidden, order, table, results, first=run.start, last=run.stop, workspace=self._workspace)
                rows = order.rows(run.start, run.stop)
                self._fetched_rows += rows.stop - rows.start
        return cpu.combine(results, order.place, topk.weights, dtype=hidden.dtype)

    def pass_begins(self) -> None:
        """Workers that are new are found."""
        if self._caller is not None:
            self._caller.look()

    def batch_done(self, passes: Sequence[tuple[int, int]], seconds: float) -> None:
        """Tells the launcher, at most once a second."""
        del passes
        self._steps += seconds
        if self._caller is None:
            return
        counts = self._caller.counts
        # What went wrong is told at once: the next batch on this rank may be long in coming.
        wrong = (counts.late, counts.declined, self._fetched_rows)
        if wrong != self._wrong or time.monotonic() >= self._report_at:
            self._wrong = wrong
            self._report()

    def close(self) -> None:
        """Hangs up."""
        if self._caller is not None:
            self._caller.close()

    def _send(
        self, caller: Caller, layer: int, entry: _Layer, hidden: torch.Tensor, order: Sorted
    ) -> tuple[list[Sent], list[range]]:
        """Calls under way, and the runs of experts whose rows nobody takes."""
        starts = order.starts.tolist()
        sent, left = [], []
        caller.begin()
        able = caller.able()
        if (layer, able) not in self._asked:
            group = self.place.config.group
            self._asked[layer, able] = whom_to_ask(entry.missing, entry.holders, able, group.node, group.nodes)
        for asked, run in self._asked[layer, able]:
            rows = range(starts[run.start], starts[run.stop])
            if not len(rows):
                continue
            call = None
            if asked is not None:
                tokens = order.tokens[rows.start : rows.stop]
                distinct, places = torch.unique(tokens, return_inverse=True)
                counts = [starts[expert + 1] - starts[expert] for expert in run]
                call = caller.send(
                    asked, layer, run, counts, rows, hidden.index_select(0, distinct), places.to(torch.int32)
                )
            if call is None:
                left.append(run)
            else:
                sent.append(call)
        return sent, left

    def _await_workers(self, caller: Caller) -> None:
        group, deadline = self.place.config.group, time.monotonic() + _WORKER_SECONDS
        while len(caller.able()) < group.nodes - 1:
            if time.monotonic() >= deadline:
                logger.warning("rank %d: not every host has a worker yet; experts are fetched", self.place.rank)
                return
            time.sleep(0.1)
            caller.refresh()

    def _report(self) -> None:
        self._report_at = time.monotonic() + _REPORT_SECONDS
        assert self._caller is not None
        counts = self._caller.counts
        report = CallReport(
            rank=self.place.rank,
            layers=len(self._layers),
            **vars(counts),
            fetched_rows=self._fetched_rows,
            step_seconds=self._steps,
        )
        self.place.experts.client.ask(report, Done)
