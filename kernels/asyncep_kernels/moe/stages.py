"""The three stages of ``moe``: sort assignments by expert, run a contiguous run of experts, combine what came of them.

A strategy that sends tokens to experts needs them apart: rows of some experts may be computed elsewhere, in any order,
as long as each comes back to its place before the last stage. `asyncep_kernels.moe.cpu` has the stages on CPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sorted(NamedTuple):
    """Assignments (token, k) ordered by expert, tokens ascending within each. R of the ``T * K`` are kept."""

    starts: torch.Tensor
    """``(E + 1,)`` int64: expert e has the rows from ``starts[e]`` up to ``starts[e + 1]``; the last entry is R."""
    tokens: torch.Tensor
    """``(T * K,)`` int32: the token of each row; from R on without meaning."""
    place: torch.Tensor
    """``(T, K)`` int32: the row of each assignment; -1 for an ignored one."""

    def rows(self, first: int, last: int) -> slice:
        """The rows of experts ``first`` up to ``last``."""
        start, end = self.starts[first].item(), self.starts[last].item()
        return slice(int(start), int(end))

    def arrived(self, rows: int) -> Sorted:
        """As it is where the rows themselves were sent, in this order: row i is of row i. There is nothing to combine.

        Args:
            rows: that arrived.
        """
        return Sorted(self.starts, torch.arange(rows, dtype=torch.int32), self.place[:0])
