"""Weights or tokens, whichever is faster, layer by layer: the runtime's own plan with simulated prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncep.sim.kernels import ACTIVATION_BYTES, Kernels
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.strategies.base import Outcome
from asyncep.sim.work import Batch
from asyncep_sgl.experts.calls.plan import Prices, seconds_by_fetched, used

# Rows of one expert at which the price of one more row is taken, and rows an expert at which that of reading one is.
_MANY, _FEW = 4096, 8


@dataclass
class Neighbours:
    """The ranks of one group: until when each is known to compute, in simulated seconds."""

    until: dict[int, float] = field(default_factory=dict)

    def busy(self, rank: int, now: float) -> float:
        """Share of the others that compute at ``now``."""
        others = [until for other, until in self.until.items() if other != rank]
        return sum(until > now for until in others) / len(others) if others else 1.0


class ExpertCalls:
    """One rank that fetches the hottest missing experts and sends the rows of the others.

    What is fetched is chosen with perfect knowledge of the shares; layers follow each other without carrying over what
    one has left of its window.

    Args:
        kernels: seconds of the model's layers on one device.
        gather: t_EP of a whole layer, seconds.
        ranks: of the group.
        skew: how unevenly tokens choose experts.
        latency: of the link, seconds.
        number: of this rank within the group.
        neighbours: the group.
    """

    lanes = 1
    devices = 1

    def __init__(
        self,
        kernels: Kernels,
        gather: float,
        ranks: int,
        skew: ExpertSkew,
        latency: float,
        number: int,
        neighbours: Neighbours,
    ) -> None:
        self.kernels = kernels
        self._gather = gather
        self._ranks = ranks
        self._skew = skew
        self._latency = latency
        self._number = number
        self._neighbours = neighbours
        neighbours.until.setdefault(number, 0.0)

    def run(self, now: float, batches: Sequence[Batch | None]) -> Outcome:
        """See `Executor`."""
        batch = batches[0]
        if batch is None:
            return Outcome(now, (None,))
        busy = self._neighbours.busy(self._number, now)
        by_kind = [self._layer(kind, batch, busy) for kind in range(len(self.kernels.model.kinds))]
        end = now + sum(by_kind[kind] for kind in self.kernels.model.order) + self.kernels.head(batch)
        self._neighbours.until[self._number] = end
        return Outcome(end, (end,))

    def _layer(self, index: int, batch: Batch, busy: float) -> float:
        kernels, kind = self.kernels, self.kernels.model.kinds[index]
        mlp = kind.shape.mlp
        attention = kernels.attention(index, batch)
        if not mlp.experts or not batch.tokens:
            return attention
        total = batch.tokens * mlp.top_k
        # Of every `ranks` experts, hottest first, one is here.
        rows_of = [total * share for share in self._skew.shares(mlp.experts)]
        rows = [each for number, each in enumerate(rows_of) if number % self._ranks]
        here = rows_of[:: self._ranks]
        fetch = self._gather / max(1, len(rows))
        per_byte = fetch / (kind.expert_bytes / mlp.experts)
        state = kernels.model.hidden * ACTIVATION_BYTES * per_byte
        row = (kernels.experts(index, 2 * _MANY, 1) - kernels.experts(index, _MANY, 1)) / _MANY
        once, twice = (kernels.experts(index, _FEW * count, count) for count in (mlp.experts, 2 * mlp.experts))
        expert = max(0.0, (twice - once) / mlp.experts - _FEW * row)
        # What a layer costs once, however many experts it has.
        attention += max(0.0, 2 * once - twice)
        prices = Prices(fetch, expert, row, state, state, 2 * self._latency)
        own = prices.work(used(here), sum(here))
        return min(seconds_by_fetched(rows, own=own, other=attention, tokens=batch.tokens, prices=prices, busy=busy))
