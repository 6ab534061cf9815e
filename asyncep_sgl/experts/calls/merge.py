"""Several callers' rows as one: sorted by expert, so that an expert's weights are read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from asyncep_kernels.moe.stages import Sorted


class Rows(NamedTuple):
    """One caller's rows.

    ``first`` is an expert, ``counts`` the rows of each from it on, ``hidden`` ``(tokens, H)``, ``order`` ``(rows,)``
    int32: the token of each row.
    """

    first: int
    counts: Sequence[int]
    hidden: torch.Tensor
    order: torch.Tensor


class Merged(NamedTuple):
    """All callers' rows.

    Attributes:
        hidden: ``(tokens of all, H)``.
        order: of all rows over all experts of the layer; there is nothing to combine.
        first, last: experts that have rows lie between.
        starts: for each caller ``(last - first + 1,)``: where each expert's rows begin, within the caller's.
        rows: for each caller ``(rows,)`` int64: where its rows are among all; None where they are all there is.
    """

    hidden: torch.Tensor
    order: Sorted
    first: int
    last: int
    starts: list[np.ndarray]
    rows: list[torch.Tensor | None]

    def part(self, caller: int, first: int, last: int) -> range:
        """A caller's rows, within its own, of experts ``first`` up to ``last``."""
        starts = self.starts[caller]
        return range(int(starts[first - self.first]), int(starts[last - self.first]))

    def products(self, results: torch.Tensor, caller: int, part: range) -> torch.Tensor:
        """``(len(part), H)``: of `part`, out of the results of all rows."""
        rows = self.rows[caller]
        if rows is None:
            return results[part.start : part.stop]
        return results.index_select(0, rows[part.start : part.stop])

    def groups(self, rows: int) -> list[range]:
        """Runs of experts with at least ``rows`` rows each, but for the last."""
        found, begin = [], self.first
        starts = self.order.starts.tolist()
        for expert in range(self.first, self.last):
            if starts[expert + 1] - starts[begin] >= rows or expert + 1 == self.last:
                found.append(range(begin, expert + 1))
                begin = expert + 1
        return found


def merge(callers: Sequence[Rows], experts: int) -> Merged:
    """Rows by expert, those of one expert by caller, those of one caller as they came.

    Args:
        callers: at least one.
        experts: of the layer.
    """
    first = min(rows.first for rows in callers)
    last = max(rows.first + len(rows.counts) for rows in callers)
    counts = np.zeros((len(callers), experts), dtype=np.int64)
    for at, rows in enumerate(callers):
        counts[at, rows.first : rows.first + len(rows.counts)] = rows.counts
    starts = np.concatenate(([0], counts.sum(axis=0).cumsum()))
    of_each = [np.concatenate(([0], row[first:last].cumsum())) for row in counts]
    nothing = torch.empty((0, 1), dtype=torch.int32)
    if len(callers) == 1:
        (only,) = callers
        order = Sorted(torch.from_numpy(starts), only.order, nothing)
        return Merged(only.hidden, order, first, last, of_each, [None])
    tokens = np.empty(int(starts[-1]), dtype=np.int32)
    # Where the next rows of each expert go.
    free = starts[:-1].copy()
    beyond = 0
    places: list[torch.Tensor | None] = []
    for at, rows in enumerate(callers):
        place = np.repeat(free - (counts[at].cumsum() - counts[at]), counts[at]) + np.arange(len(rows.order))
        tokens[place] = rows.order.numpy() + beyond
        places.append(torch.from_numpy(place))
        free += counts[at]
        beyond += len(rows.hidden)
    hidden = torch.cat([rows.hidden for rows in callers])
    order = Sorted(torch.from_numpy(starts), torch.from_numpy(tokens), nothing)
    return Merged(hidden, order, first, last, of_each, places)
