"""A rank of several that read one memory of experts: idle ranks compute a part of a busy one's layers."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from asyncep_kernels.help.visits import Weights
from asyncep_kernels.moe.table import ExpertTable
from asyncep_sgl.experts.help.helper import Helper
from asyncep_sgl.experts.help.offering import Offering, join_board
from asyncep_sgl.experts.store.messages import HelpReport
from asyncep_sgl.strategies.base import Attention, ExpertLayer, RankPlace, RankStrategy, TopK

_REPORT_SECONDS = 1.0


class HelpedRank(RankStrategy):
    """Offers its layers to idle ranks, and helps others while it is idle. The answers do not change.

    Args:
        place: the rank; it computes on a CPU with the C kernels.
    """

    def __init__(self, place: RankPlace) -> None:
        super().__init__(place)
        self._offering = Offering(join_board(place.config.help_board, place.config.ranks, place.rank))
        self._helper: Helper | None = None
        self._report_at = 0.0

    def loaded(self) -> None:
        """Every rank's experts are in memory, and read-only: from now on this rank helps, if they are in bf16."""
        super().loaded()
        experts = self.place.experts
        tables = {}
        for layer in experts.layouts:
            parameters = experts.parameters(layer)
            tables[layer] = ExpertTable(parameters["w13_weight"].data, parameters["w2_weight"].data)
        if any(table.w13[0].dtype != torch.bfloat16 for table in tables.values()):
            return
        self._helper = Helper(self._offering.board, Weights(tables))
        self._helper.start()
        self._report()

    def in_place(self, layer: int) -> bool:
        """Every layer: this host's memory has all experts."""
        del layer
        return True

    def batch_begins(self) -> None:
        """From now on this rank computes its own."""
        self._offering.board.idle = False

    def moe(self, layer: ExpertLayer, hidden: torch.Tensor, topk: TopK) -> torch.Tensor:
        """With whoever is idle."""
        found = self._offering.moe(layer.index, hidden, topk.ids, topk.weights, layer.own)
        return layer.compute(hidden, topk, layer.own) if found is None else found

    def attention(self, asked: Attention) -> bool:
        """With whoever is idle."""
        return self._offering.attention(
            asked.q, asked.k_cache, asked.v_cache, asked.plan, scale=asked.scale, out=asked.out
        )

    def batch_done(self, passes: Sequence[tuple[int, int]], seconds: float) -> None:
        """This rank may help again. Tells the launcher, at most once a second."""
        if self._helper is None:
            return
        self._offering.board.idle = True
        if time.monotonic() >= self._report_at:
            self._report()

    def close(self) -> None:
        """Helps nobody any more."""
        if self._helper is not None:
            self._helper.close()

    def _report(self) -> None:
        self._report_at = time.monotonic() + _REPORT_SECONDS
        report = HelpReport(rank=self.place.rank, **vars(self._offering.counts))
        self.place.experts.client.tell(report)
