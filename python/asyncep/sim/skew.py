"""How unevenly tokens choose experts.

Popularity falls as a power of rank, p_i ~ i^-s, i = 1 … E; s follows from the ratio of the most to the least popular
expert, s = ln(ratio) / ln(E). The paper's 16x on Qwen3-30B-A3B (128 experts) gives s = 0.571. Which experts are popular
is drawn anew for every layer, and experts are placed on devices in order, as checkpoints are.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from asyncep.sim.errors import DataError

MEASURED_RATIO = 16.0
"""Max/min load the paper reports for Qwen3-30B-A3B (second-hand)."""


@dataclass(frozen=True)
class ExpertSkew:
    """`ratio`: tokens of the most popular expert over those of the least; 1: all alike."""

    ratio: float = MEASURED_RATIO
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ratio >= 1 or not math.isfinite(self.ratio):
            raise DataError(f"skew ratio={self.ratio!r}: must be at least 1")

    def exponent(self, experts: int) -> float:
        """s of the power law."""
        return math.log(self.ratio) / math.log(experts) if experts > 1 else 0.0

    def shares(self, experts: int) -> tuple[float, ...]:
        """Share of the (token, expert) pairs by popularity, largest first, sum 1."""
        s = self.exponent(experts)
        weights = [i**-s for i in range(1, experts + 1)]
        total = sum(weights)
        return tuple(weight / total for weight in weights)

    def loads(self, experts: int, ranks: int, layer: int) -> tuple[float, ...]:
        """Load of each rank in a layer over the mean (mean 1)."""
        return _loads(self, experts, ranks, layer)

    def hottest(self, experts: int, ranks: int, layers: int) -> float:
        """Mean over layers of the busiest rank's load over the mean: what a barrier per layer costs."""
        if ranks <= 1 or experts <= 1 or layers < 1:
            return 1.0
        return sum(max(self.loads(experts, ranks, layer)) for layer in range(layers)) / layers


@lru_cache(maxsize=65536)
def _loads(skew: ExpertSkew, experts: int, ranks: int, layer: int) -> tuple[float, ...]:
    shares = list(skew.shares(experts))
    random.Random(f"{skew.seed}/{layer}").shuffle(shares)
    loads = [0.0] * ranks
    for expert, share in enumerate(shares):
        loads[expert * ranks // experts] += share * ranks
    return tuple(loads)
