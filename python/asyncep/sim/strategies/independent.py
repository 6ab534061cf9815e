"""AsyncEP by one-sided reads, hybrid prefetch and replicated data parallelism: every rank has its own clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from asyncep.sim.gather import Pipeline, Run
from asyncep.sim.kernels import Kernels
from asyncep.sim.strategies.base import Outcome
from asyncep.sim.work import Batch


def layer_runs(kernels: Kernels, batch: Batch, gather: float, tax: float = 0.0) -> Iterator[Run]:
    """The model's layers as runs of equal ones; a layer without experts adds its seconds to the next one's attention.

    `gather`: seconds of a sparse layer's gather. `tax`: seconds by which a gather slows a layer's computation.
    """
    times = [kernels.whole_layer(index, batch) for index in range(len(kernels.model.kinds))]
    sparse = [bool(kind.shape.mlp.experts) for kind in kernels.model.kinds]
    carried = 0.0
    order = kernels.model.order
    position = 0
    while position < len(order):
        kind = order[position]
        end = position
        while end < len(order) and order[end] == kind:
            end += 1
        count, position = end - position, end
        attention, experts = times[kind]
        if not sparse[kind]:
            carried += count * (attention + experts)
            continue
        if carried:
            yield Run(1, carried + attention + tax, experts, gather)
            carried, count = 0.0, count - 1
        if count:
            yield Run(count, attention + tax, experts, gather)
    if carried:
        yield Run(1, carried, 0.0, 0.0)


class OneSidedGather:
    """One rank of AsyncEP. `gather`: t_EP in seconds; 0 for a rank that has all experts (replicated).

    The next batch's first layers are fetched while this one's last compute, so batches follow without a bubble.
    """

    lanes = 1
    devices = 1

    def __init__(self, kernels: Kernels, gather: float, depth: int = 2) -> None:
        self.kernels = kernels
        self.gather = gather
        self.pipeline = Pipeline(depth)

    def run(self, now: float, batches: Sequence[Batch | None]) -> Outcome:
        batch = batches[0]
        if batch is None:
            return Outcome(now, (None,))
        end, stalled = self.pipeline.run(now, layer_runs(self.kernels, batch, self.gather))
        end += self.kernels.head(batch)
        return Outcome(end, (end,), stalled)
