"""One layer's rows on a CPU: sorted by expert, computed run by run, here or elsewhere, combined in a fixed order."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from asyncep_kernels.moe import cpu
from asyncep_sgl.experts.shard.layout import runs

if TYPE_CHECKING:
    import torch

    from asyncep_kernels.moe.table import ExpertTable
    from asyncep_kernels.workspace import Workspace
    from asyncep_sgl.strategies.base import TopK


class LayerRows:
    """A row is one assignment of a token to an expert. Its bits do not depend on who computes it, or when.

    Args:
        hidden: ``(T, H)``.
        topk: where its tokens go.
        table: says how many experts there are and in which format.
        workspace: keeps the memory for the next layer, which overwrites it.

    Attributes:
        starts: ``starts[e]`` to ``starts[e + 1]`` are the rows of expert e.
        results: ``(rows, H)``, the products; each row has to be written before `combined`.
    """

    def __init__(self, hidden: torch.Tensor, topk: TopK, table: ExpertTable, workspace: Workspace) -> None:
        self.hidden = hidden
        self.order = cpu.sort(topk.ids, len(table.w13), workspace=workspace)
        self.starts: list[int] = self.order.starts.tolist()
        shape = (topk.ids.numel(), hidden.shape[1])
        self.results = workspace.take("rows.results", shape, cpu.results_dtype(hidden, table))
        self._weights = topk.weights
        self._workspace = workspace

    def count(self, expert: int) -> int:
        """Rows of one expert."""
        return self.starts[expert + 1] - self.starts[expert]

    def by_tokens(self, experts: Collection[int], pieces: int) -> list[dict[int, range]]:
        """The rows of ``experts``, cut between tokens; of each piece, experts that have rows with their ranges."""
        tokens = self.order.tokens.numpy()
        bounds = [len(self.hidden) * number // pieces for number in range(pieces + 1)]
        found: list[dict[int, range]] = [{} for _ in range(pieces)]
        for expert in sorted(experts):
            start, stop = self.starts[expert], self.starts[expert + 1]
            # An expert's rows stand in the order of their tokens.
            cuts = [start, *(start + np.searchsorted(tokens[start:stop], bounds[1:-1])).tolist(), stop]
            for piece, (first, last) in zip(found, itertools.pairwise(cuts), strict=True):
                if first < last:
                    piece[expert] = range(first, last)
        return [piece for piece in found if piece]

    def compute(self, experts: Collection[int], table: ExpertTable) -> int:
        """Computes the rows of ``experts`` here; returns how many."""
        found = 0
        for run in runs(frozenset(experts)):
            rows = self.starts[run.stop] - self.starts[run.start]
            if rows:
                cpu.run(
                    *(self.hidden, self.order, table, self.results),
                    first=run.start,
                    last=run.stop,
                    workspace=self._workspace,
                )
            found += rows
        return found

    def combined(self) -> torch.Tensor:
        """``(T, H)`` in the dtype of the hidden states: each token's weighted sum over its experts."""
        return cpu.combine(self.results, self.order.place, self._weights, dtype=self.hidden.dtype)
