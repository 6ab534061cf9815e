"""A rank that chooses between weights and tokens: what is fetched, what is sent, what is computed here."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch

from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.workspace import Workspace
from asyncep_sgl.experts.calls.caller import Caller, Sent
from asyncep_sgl.experts.calls.choice import AtRandom, ByCost, Choice, LayerPlace, Routed, SendAll, Under
from asyncep_sgl.experts.calls.late import LateExperts
from asyncep_sgl.experts.calls.measure import seconds_of_work, share_of_copying
from asyncep_sgl.experts.calls.owners import whom_to_ask
from asyncep_sgl.experts.calls.plan import Prices
from asyncep_sgl.experts.gather.gather import ExpertGather, InParts
from asyncep_sgl.experts.gather.log import GatherBook
from asyncep_sgl.experts.gather.pipeline import Gathered
from asyncep_sgl.experts.group.view import ViewLine
from asyncep_sgl.experts.sources.chosen import ChosenExperts
from asyncep_sgl.experts.start import missing_layers, peer_source, start_gather
from asyncep_sgl.experts.store.messages import CallReport
from asyncep_sgl.strategies.base import ExpertLayer, RankPlace, RankStrategy, TopK
from asyncep_sgl.strategies.layer_rows import LayerRows

if TYPE_CHECKING:
    from asyncep_sgl.experts.gather.gather import GatheredLayer

logger = logging.getLogger("asyncep")

_REPORT_SECONDS = 1.0
# At the start workers come a moment after the experts that they compute with.
_WORKER_SECONDS = 15.0
# Calls of one row, to see how long one takes at least.
_TRIES = 8
# Where no worker answers yet.
_CALL_SECONDS = 1e-3

Chooser = Callable[["dict[int, LayerPlace]", Caller], Choice]
"""Makes a rank's `Choice` from where each layer's experts are."""


def send_all(layers: dict[int, LayerPlace], caller: Caller) -> Choice:
    """Of the strategy ``ep``."""
    del caller
    return SendAll(layers)


def by_cost(layers: dict[int, LayerPlace], caller: Caller) -> Choice:
    """Of the strategy ``auto``."""
    return ByCost(layers, caller.busy, caller.able)


def at_random(seed: int) -> Chooser:
    """Of the strategy ``random:SEED``."""
    return lambda layers, caller: AtRandom(layers, random.Random(seed))


class CallingRank(RankStrategy):
    """Computes the rows of its host's experts and of those that were fetched, and sends the others.

    Args:
        place: the rank.
        chooser: which are which.
        fetches: weights are fetched ahead of the computation.
    """

    def __init__(self, place: RankPlace, chooser: Chooser, *, fetches: bool) -> None:
        super().__init__(place)
        self._chooser = chooser
        self._fetches = fetches
        self._layers: dict[int, LayerPlace] = {}
        self._workspace = Workspace()
        self._caller: Caller | None = None
        self._choice: Choice | None = None
        self._gather: ExpertGather | None = None
        self._book: GatherBook | None = None
        self._late: LateExperts | None = None
        self._floor = float(place.cost.flops(place.config.settings.threshold_tokens))
        self._row_flops = 0.0
        self._released: float | None = None
        self._sent_rows = 0
        self._fetched_rows = 0
        self._steps = 0.0
        self._report_at = 0.0
        self._wrong = (0, 0, 0)

    # --- the model ------------------------------------------------------------------------------------------------

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
            self._layers[entry.layer] = LayerPlace(
                layout.experts, held[group.node], layout.missing(entry.layer, group.node), held
            )
        hidden, inter = layers[0].parameters["w2_weight"].shape[1:]
        self._row_flops = 6.0 * hidden * inter
        self._caller = Caller(ViewLine(group.exporter_address), verify=group.verify == "every")
        self._choice = self._chooser(self._layers, self._caller)
        self._late = LateExperts(layers, peer_source(manager, group, "late"))
        if self._fetches:
            self._start_gather(layers, self._choice)
        else:
            self._await_workers(self._caller)
        self._report()

    def _start_gather(self, layers: Sequence[GatheredLayer], choice: Choice) -> None:
        place, caller = self.place, self._caller
        assert caller is not None
        source = ChosenExperts(peer_source(place.experts, place.config.group), choice.prefetch)
        started = start_gather(
            place.experts,
            place.config.group,
            place.folder(),
            len(place.cost.shape.layers),
            place.config.group.log_gathers,
            source=source,
        )
        assert started is not None, layers
        self._gather, self._book = started
        self.batch_flops = self._target
        # What was begun ahead would be measured with the rest.
        self._gather.pipeline.close()
        self._await_workers(caller)
        if isinstance(choice, ByCost):
            choice.prices = self._measured(layers, self._book)
            logger.info("rank %d: %s", place.rank, choice.prices)
        source.choosing = True
        self._gather.begin()

    def _await_workers(self, caller: Caller) -> None:
        group, deadline = self.place.config.group, time.monotonic() + _WORKER_SECONDS
        while len(caller.able()) < group.nodes - 1:
            if time.monotonic() >= deadline:
                logger.warning("rank %d: not every host has a worker yet; experts are fetched", self.place.rank)
                return
            time.sleep(0.1)
            caller.refresh()

    def _measured(self, layers: Sequence[GatheredLayer], book: GatherBook) -> Prices | None:
        """What fetching, computing and calling cost, while this rank does nothing else.

        None on a host that has no experts of any of these layers, which more ranks than experts can make: it fetches.
        """
        assert self._late is not None
        late = self._late
        first = next((entry for entry in layers if self._layers[entry.layer].own), None)
        if first is None:
            return None
        table = ExpertTable(first.parameters["w13_weight"], first.parameters["w2_weight"])
        own = self._layers[first.layer].own
        expert, row = seconds_of_work(table, own)
        copying = share_of_copying(table, own, lambda: late.start(first.layer))
        fetch = book.seconds / len(first.slot.experts)
        weights = first.parameters["w2_weight"]
        per_byte = fetch / sum(first.slot.strides.values())
        state = weights.shape[1] * weights.element_size() * per_byte
        calls = [seconds for _ in range(_TRIES) if (seconds := self._call_seconds(first.layer, weights)) is not None]
        call = min(calls, default=_CALL_SECONDS)
        return Prices(fetch, expert, row, state, state, max(0.0, call - expert - row), copying)

    def _call_seconds(self, layer: int, weights: torch.Tensor) -> float | None:
        """Of one call of one row; None if nobody answers."""
        assert self._caller is not None
        place, group = self._layers[layer], self.place.config.group
        caller = self._caller
        caller.begin()
        began = time.monotonic()
        (asked,) = whom_to_ask([min(place.missing)], place.holders, caller.able(), group.node, group.nodes)
        if asked.node is None:
            return None
        hidden = torch.zeros((1, weights.shape[1]), dtype=weights.dtype)
        call = caller.send(
            asked.node, layer, {asked.experts[0]: 1}, [range(1)], hidden, torch.zeros(1, dtype=torch.int32)
        )
        if call is None:
            time.sleep(0.05)  # a connection takes a moment to come about
            return None
        return None if caller.collect([call], torch.empty_like(hidden)) else time.monotonic() - began

    def in_place(self, layer: int) -> bool:
        """Whether a layer is kept whole."""
        return layer not in self._layers

    # --- computing ------------------------------------------------------------------------------------------------

    def pass_begins(self) -> None:
        """Workers that are new are found, and fetches begin."""
        self._released = None
        if self._caller is not None:
            self._caller.look()
        if self._gather is not None:
            self._gather.begin()

    def moe(self, layer: ExpertLayer, hidden: torch.Tensor, topk: TopK) -> torch.Tensor:
        """See `RankStrategy`. The bits do not depend on who computes a row."""
        if layer.index not in self._layers or self._caller is None:
            return layer.compute(hidden, topk, layer.own)
        began = time.monotonic()
        before = None if self._released is None else began - self._released
        table, coming = layer.own, None
        if self._gather is not None:
            table, coming = self._gather.take(layer.index, patient=False)
        if topk.ids.numel():
            rows = LayerRows(hidden, topk, table, self._workspace)
            self._compute(layer.index, rows, table, coming, before)
            out = rows.combined()
        else:
            out = layer.compute(hidden, topk, layer.own)
        if self._gather is not None:
            self._gather.release(layer.index)
        self._released = time.monotonic()
        return out

    def _compute(
        self, layer: int, rows: LayerRows, table: ExpertTable, coming: InParts | None, before: float | None
    ) -> None:
        """Every row of a layer, somewhere."""
        assert self._caller is not None
        assert self._choice is not None
        place, caller = self._layers[layer], self._caller
        parts = coming.parts if coming is not None else ()
        under = [Under(part.experts, part.there(), part.coming()) for part in parts]
        routed = Routed(layer, len(rows.hidden), rows.starts, before)
        decision = self._choice.decide(routed, under)
        sent, left = self._send(caller, place, rows, routed, decision.send)
        left |= decision.fetch
        awaited = [(part, one) for part, one, wait in zip(parts, under, decision.wait, strict=True) if wait]
        here = {expert for _, one in awaited if one.there for expert in one.experts}
        rows.compute(place.own | here, table)
        waited = caller.counts.wait_seconds
        exposed = 0.0
        for part, one in awaited:
            if not one.there and routed.rows_of(one.experts):
                since = time.monotonic()
                part.wait()
                exposed += time.monotonic() - since
                rows.compute(one.experts, table)
        for call in caller.collect(sent, rows.results):
            left |= frozenset(call.experts)
            self._sent_rows -= call.count
        exposed += caller.counts.wait_seconds - waited
        if left:
            exposed += self._fetch_now(layer, rows, left)
        if self._gather is not None:
            times = [(len(part.experts), part.wait()) for part in parts if part.there()]
            experts, seconds = sum(experts for experts, _ in times), sum(one.seconds for _, one in times)
            exact = all(one.exact for _, one in times)
            if experts and exact and seconds > 0 and isinstance(self._choice, ByCost):
                # Of parts that end together the first seems to have taken all of the time: their sum is right.
                self._choice.fetched(experts, seconds)
            whole = experts == len(place.missing)
            self._gather.pipeline.waited(exposed, Gathered(seconds, exact) if whole else None)

    def _fetch_now(self, layer: int, rows: LayerRows, experts: Collection[int]) -> float:
        """What nobody else computes; seconds that it was waited for."""
        assert self._late is not None
        since = time.monotonic()
        table = self._late.table(layer, experts)
        seconds = time.monotonic() - since
        self._fetched_rows += rows.compute(experts, table)
        return seconds

    def _send(
        self, caller: Caller, place: LayerPlace, rows: LayerRows, routed: Routed, experts: frozenset[int]
    ) -> tuple[list[Sent], frozenset[int]]:
        """Calls under way, and experts some of whose rows nobody takes."""
        assert self._choice is not None
        caller.begin()
        if not experts:
            return [], frozenset()
        group = self.place.config.group
        sent: list[Sent] = []
        left: set[int] = set()
        for node, wanted in whom_to_ask(experts, place.holders, caller.able(), group.node, group.nodes):
            if node is None:
                left.update(wanted)
                continue
            for places in rows.by_tokens(wanted, self._choice.pieces(routed, wanted)):
                tokens = torch.cat([rows.order.tokens[one.start : one.stop] for one in places.values()])
                distinct, order = torch.unique(tokens, return_inverse=True)
                counts = {expert: len(one) for expert, one in places.items()}
                states = rows.hidden.index_select(0, distinct)
                call = caller.send(node, routed.layer, counts, [*places.values()], states, order.to(torch.int32))
                if call is None:
                    left.update(counts)
                else:
                    self._sent_rows += call.count
                    sent.append(call)
        return sent, frozenset(left)

    # --- the books ------------------------------------------------------------------------------------------------

    def batch_done(self, passes: Sequence[tuple[int, int]], seconds: float) -> None:
        """Learns from it, and tells the launcher, at most once a second."""
        self._steps += seconds
        if self._caller is None:
            return
        if self._gather is not None and self._book is not None:
            # What others computed does not belong to this rank's window.
            flops = float(self.place.cost.batch_flops(list(passes))) - self._sent_rows * self._row_flops
            self._book.batch(self._gather.take_trace(), max(0.0, flops), seconds, self._target())
        self._sent_rows = 0
        counts = self._caller.counts
        # What went wrong is told at once: the next batch on this rank may be long in coming.
        wrong = (counts.late, counts.declined, self._fetched_rows)
        if wrong != self._wrong or time.monotonic() >= self._report_at:
            self._wrong = wrong
            self._report()

    def close(self) -> None:
        """Hangs up."""
        if self._gather is not None:
            self._gather.pipeline.close()
        if self._caller is not None:
            self._caller.close()

    def _target(self) -> float:
        """FLOPs that a batch should cost where there is more work: T, or what computes well where that is more."""
        assert self._book is not None
        return max(self.place.cost.threshold_flops(self._book.threshold()), self._floor)

    def _report(self) -> None:
        self._report_at = time.monotonic() + _REPORT_SECONDS
        assert self._caller is not None
        client = self.place.experts.client
        if self._book is not None and self._gather is not None:
            counters = self._gather.counters
            self.place.tell_threshold(self._book.threshold())
            client.tell(self._book.report(counters.digest_failures, counters.peer_losses))
        report = CallReport(
            rank=self.place.rank,
            layers=len(self._layers),
            **vars(self._caller.counts),
            fetched_rows=self._fetched_rows,
            step_seconds=self._steps,
        )
        client.tell(report)
