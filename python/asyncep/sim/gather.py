"""When a batch's layers run while their experts are being gathered in the background.

Layer l first does what needs no gathered weights (attention, a seconds), then its experts (m seconds). Gathers run
one after another, in layers' order, across batches; a gather of g seconds may begin when one of `depth` slots is
free, and layer l's slot is free when its experts are done:

    G(l) = max(G(l-1), E(l-depth)) + g(l)
    E(l) = max(E(l-1) + a(l), G(l)) + m(l)

A layer without gathered experts takes no slot: its seconds belong to the next layer's a.

For n equal layers the recurrence has a closed form. It is a longest path, its cycles weigh a + m (stay on the compute
chain), g (stay on the gather chain) and (g + m) / depth (change over and back); for depth >= 2 the last never exceeds
the larger of the first two, so a longest path changes chain at most once each way, at an end of the run.
`test/asyncep/sim` holds it against the recurrence and against a simulation event by event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Run:
    """`count` equal layers with gathered experts, one after another: a, m and g of the module's formulas."""

    count: int
    attention: float
    experts: float
    gather: float


@dataclass(slots=True)
class Pipeline:
    """One rank's compute and gather chains. `depth`: slots, at least 1.

    `gathered`: when the gather channel is free. `released`: when the last `depth` layers' experts were done, oldest
    first. All seconds on the simulation's clock.
    """

    depth: int = 2
    gathered: float = 0.0
    released: deque[float] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth={self.depth!r}: must be at least 1")
        if not self.released:
            self.released.extend([0.0] * self.depth)

    def run(self, start: float, runs: Iterable[Run]) -> tuple[float, float]:
        """A batch of these layers, starting at `start`: (end, seconds it stood still for weights)."""
        now, busy = start, 0.0
        for part in runs:
            if part.count < 1:
                continue
            busy += part.count * (part.attention + part.experts)
            if not part.gather and not part.experts:  # layers without experts, at the model's end
                now += part.count * part.attention
                continue
            now = self._equal(now, part) if part.count > self.depth >= 2 else self._each(now, part)
        return now, max(0.0, now - start - busy)

    def _each(self, now: float, part: Run) -> float:
        """The recurrence itself."""
        for _ in range(part.count):
            self.gathered = max(self.gathered, self.released.popleft()) + part.gather
            now = max(now + part.attention, self.gathered) + part.experts
            self.released.append(now)
        return now

    def _equal(self, now: float, part: Run) -> float:
        """The same in closed form, for more layers than slots and at least two slots."""
        n, c, m, g, depth = part.count, part.attention + part.experts, part.experts, part.gather, self.depth
        before = tuple(self.released)  # E(1-depth) … E(0)
        channel = self.gathered
        slow = max(c, g)

        def done(layer: int) -> float:
            """E(layer) for layer >= 1: the longest path into it from each thing that is known."""
            best = max(now + layer * c, channel + g + (layer - 1) * slow + m)
            for i in range(1, min(depth, layer) + 1):
                best = max(best, before[i - 1] + g + (layer - i) * slow + m)
            if layer > depth:
                # This batch may have begun later than the slots were free: over to the gather chain at once.
                best = max(best, done(1) + g + (layer - depth - 1) * slow + m)
            return best

        # G(n): from the channel, from the slots known, and from those released on the way (a convex function of the
        # layer, so its ends suffice).
        gathered = channel + n * g
        for i in range(1, depth + 1):
            gathered = max(gathered, before[i - 1] + (n - i + 1) * g)
        gathered = max(gathered, done(1) + (n - depth) * g, done(n - depth) + g)
        self.gathered = gathered
        self.released = deque(done(layer) for layer in range(n - depth + 1, n + 1))
        return self.released[-1]
