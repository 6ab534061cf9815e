"""The hook of SGLang's experts on CUDA, as a process with Triton's interpreter runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from asyncep_kernels.moe.table import ExpertTable
from asyncep_sgl.strategies import current
from asyncep_sgl.strategies.base import ExpertLayer, RankStrategy, TopK

CONFIG: dict[str, Any] = {
    "activation": "silu",
    "is_gated": True,
    "gemm1_alpha": None,
    "gemm1_clamp_limit": None,
    "swiglu_limit": None,
    "apply_router_weight_on_input": False,
    "no_combine": False,
    "routed_scaling_factor": None,
}


def method(**changed: Any) -> SimpleNamespace:
    """The part of ``UnquantizedFusedMoEMethod`` that the hook looks at."""
    config = SimpleNamespace(**{**CONFIG, **changed})
    return SimpleNamespace(moe_runner_config=config, with_bias=False, w13_swiglu_interleaved=False)


def layer(w13: torch.Tensor, w2: torch.Tensor) -> SimpleNamespace:
    """The part of ``FusedMoE`` likewise."""
    return SimpleNamespace(layer_id=3, w13_weight=w13, w2_weight=w2)


class Gathering(RankStrategy):
    """A rank whose layers are computed on ``table``."""

    def __init__(self) -> None:
        self.table: ExpertTable | None = None

    def in_place(self, layer: int) -> bool:
        return False

    def moe(self, layer: ExpertLayer, hidden: torch.Tensor, topk: TopK) -> torch.Tensor:
        assert self.table is not None
        return layer.compute(hidden, topk, self.table)


@contextlib.contextmanager
def gathering() -> Iterator[Gathering]:
    """This process is such a rank meanwhile."""
    strategy = Gathering()
    current.take(strategy)
    try:
        yield strategy
    finally:
        current.take(None)


def forward(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> list[torch.Tensor]:
    """The same batch through the parameters, then with the odd experts in one slot, then in another."""
    from asyncep_sgl.rank import cuda_operators
    from asyncep_sgl.rank.cuda_operators import around_forward_cuda

    def stock(*_: Any) -> Any:
        raise AssertionError("SGLang's own operator was called")

    dispatched = SimpleNamespace(hidden_states=hidden, hidden_states_scale=None, topk_output=(weights, ids.int(), None))
    whole = layer(w13, w2)
    found = [around_forward_cuda(stock, method(), whole, dispatched).hidden_states.clone()]
    gathered = layer(w13.clone(), w2.clone())
    slots = []
    for _ in range(2):
        sides = [[side[e].clone() if e % 2 else side[e] for e in range(len(side))] for side in (w13, w2)]
        slots.append(ExpertTable(*sides))
    gathered.w13_weight[1::2] = float("nan")
    gathered.w2_weight[1::2] = float("nan")
    made = []
    real = cuda_operators.pointer_table
    cuda_operators.pointer_table = lambda *given: made.append(given) or real(*given)  # type: ignore[func-returns-value]
    try:
        with gathering() as strategy:
            for slot in (*slots, slots[0]):
                strategy.table = slot
                found.append(around_forward_cuda(stock, method(), gathered, dispatched).hidden_states.clone())
    finally:
        cuda_operators.pointer_table = real
    assert len(made) == 2, "addresses are made once a slot"
    return found
