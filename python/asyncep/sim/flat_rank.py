"""A rank that is known by its rate alone: to judge placement without a model of its kernels.

AsyncEP: while a layer computes, the next layer's experts are gathered. So a batch takes, per layer, the longer of its
computation and t_EP. Below T a batch takes as long as one of T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncep.sim.engine import Fleet
from asyncep.sim.lane import BatchLimits
from asyncep.sim.strategies.base import Outcome
from asyncep.sim.work import Batch, Model


@dataclass(frozen=True)
class RankModel:
    """The device behind a rank.

    Attributes:
        flops_per_second: achieved on this model.
        gather_seconds: t_EP, of a layer.
        batch_flops: net FLOPs at which the scheduler cuts a batch.
        cache_tokens: size of the KV cache.
        page: tokens of its pages.
        overhead: seconds that a batch costs besides.
        holds_back: the scheduler leaves a request whose prefix this batch computes for the next one.
    """

    flops_per_second: float
    gather_seconds: float
    batch_flops: float
    cache_tokens: int
    page: int = 32
    overhead: float = 0.0
    holds_back: bool = False

    def fleet(self, model: Model, ranks: int) -> Fleet:
        """Equal ranks, each with a clock of its own."""
        limits = BatchLimits(
            tokens=1 << 62,
            flops=self.batch_flops,
            cache_tokens=self.cache_tokens,
            page=self.page,
            holds_back=self.holds_back,
        )
        executors = [FlatRank(self, model.layers) for _ in range(ranks)]
        return Fleet(executors, model, limits, peak=ranks * self.flops_per_second, devices=ranks)


class FlatRank:
    """The executor of one such rank.

    Args:
        rank: the device.
        layers: each of which gathers.
    """

    lanes = 1
    devices = 1

    def __init__(self, rank: RankModel, layers: int) -> None:
        self.rank = rank
        self.gathers = rank.gather_seconds * layers

    def run(self, now: float, batches: Sequence[Batch | None]) -> Outcome:
        """One batch, from `now` on."""
        batch = batches[0]
        if batch is None:
            return Outcome(now, (None,))
        compute = batch.flops / self.rank.flops_per_second
        end = now + max(compute, self.gathers) + self.rank.overhead
        return Outcome(end, (end,), max(0.0, self.gathers - compute))
