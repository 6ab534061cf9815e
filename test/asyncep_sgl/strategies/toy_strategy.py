"""A strategy of one's own: each layer's experts in a dictionary, computed one after the other in plain torch."""

from __future__ import annotations

import torch

from asyncep_sgl.strategies.base import ExpertLayer, RankPlace, RankStrategy, Strategy, TopK


class Toy(Strategy):
    """The run's side: only the rank differs."""

    name = "toy"

    def rank(self, place: RankPlace) -> RankStrategy:
        return ToyRank(place)


class ToyRank(RankStrategy):
    """A rank that looks its experts up."""

    def __init__(self, place: RankPlace) -> None:
        super().__init__(place)
        self._experts: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}

    def loaded(self) -> None:
        super().loaded()
        print(f"rank {self.place.rank} computes with the toy", flush=True)

    def moe(self, layer: ExpertLayer, hidden: torch.Tensor, topk: TopK) -> torch.Tensor:
        if layer.index not in self._experts:
            self._experts[layer.index] = dict(enumerate(zip(*layer.own.entries(), strict=True)))
        total = torch.zeros(hidden.shape)
        for expert in topk.ids.unique().tolist():
            w13, w2 = self._experts[layer.index][expert]
            rows, places = (topk.ids == expert).nonzero(as_tuple=True)
            gate, up = (hidden[rows] @ w13.T).chunk(2, dim=-1)
            found = (torch.nn.functional.silu(gate) * up) @ w2.T
            total.index_add_(0, rows, topk.weights[rows, places, None] * found.float())
        return total.to(hidden.dtype)
