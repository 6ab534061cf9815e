"""Which experts a layer's tokens have chosen of late. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# What a row counts for after so many further ones of its layer, over the number of experts: half.
_HALF_LIFE_ROWS = 2_000


class Popularity:
    """A moving average of each layer's shares, in which each row counts alike.

    Args:
        experts: of each layer.
    """

    def __init__(self, experts: int) -> None:
        self._shares = np.full(experts, 1.0 / experts)

    def seen(self, starts: Sequence[int]) -> None:
        """A batch's rows: those of expert e stand between ``starts[e]`` and ``starts[e + 1]``."""
        total = starts[-1] - starts[0]
        if total > 0:
            keep = 0.5 ** (total / (_HALF_LIFE_ROWS * len(self._shares)))
            self._shares = keep * self._shares + (1 - keep) * np.diff(starts) / total

    def share(self, expert: int) -> float:
        """Of all rows, those of one expert: 0 to 1."""
        return float(self._shares[expert])

    def hottest(self, experts: Sequence[int]) -> list[int]:
        """``experts``, those with the most rows first."""
        return sorted(experts, key=lambda expert: (-self._shares[expert], expert))
