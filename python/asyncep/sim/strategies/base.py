"""What the engine asks of a strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from asyncep.sim.work import Batch


@dataclass(frozen=True, slots=True)
class Outcome:
    """`ready`: when the next batch may begin. `ends`: when each lane's batch is done, None where there was none.
    `stalled`: device-seconds spent waiting for weights."""

    ready: float
    ends: tuple[float | None, ...]
    stalled: float = 0.0


class Executor(Protocol):
    """Devices that keep one clock. A lane is a scheduler with its queue and cache."""

    lanes: int
    devices: int

    def run(self, now: float, batches: Sequence[Batch | None]) -> Outcome:
        """Execute a batch of each lane (None: it has none), beginning at `now`. Calls come in order of time."""
