"""What ASAP and AMoE have in common: attention and experts on separate devices, and nobody waits for everybody.

Both are simulated event by event on a backlog of batches. Messages take latency plus bytes over the sender's link;
contention where several senders meet at one receiver is left out. Attention devices hold all weights but the
experts, expert devices 1/M of those.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from asyncep.sim.collectives import distinct
from asyncep.sim.hardware import Cluster
from asyncep.sim.work import Model


@dataclass(frozen=True)
class Backlog:
    """A backlog worked off. `attention_busy`, `expert_busy`: share of their time the devices computed, while the
    backlog lasted. `launches`: batches run by expert devices; `rows`: (token, expert) pairs in them."""

    seconds: float
    tokens: int
    flops: float
    devices: int
    attention_busy: float
    expert_busy: float
    launches: int
    rows: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens computed a second."""
        return self.tokens / self.seconds


class Clock:
    """Calls in order of time; of equal times, in order of scheduling."""

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it that much later."""
        heapq.heappush(self._calls, (self.now + seconds, self._count, call))
        self._count += 1

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._calls:
            self.now, _, call = heapq.heappop(self._calls)
            call()


def message_seconds(model: Model, cluster: Cluster, tokens: float, receivers: int, itemsize: float) -> float:
    """An attention device's tokens to (or from) the `receivers` expert devices, each token once to each it needs."""
    link = cluster.inside if receivers < cluster.per_node else cluster.between
    return link.latency + tokens * distinct(model.top_k, receivers) * model.hidden * itemsize / link.bandwidth
