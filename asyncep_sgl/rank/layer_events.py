"""Tells the rank's strategy when SGLang computes a layer's experts.

SGLang asks the process's manager of gathered weights (its DWDP, which is otherwise for NVLink only) before and after
the experts of each bound layer, and before each forward pass. This takes the manager's place.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.runtime_context import set_global_dwdp_manager

from asyncep_sgl.strategies.base import RankStrategy


class LayerEvents:
    """What SGLang calls a DWDP manager: these four methods.

    Args:
        model: SGLang's; its layers of ``strategy.told`` are bound.
        strategy: is told.
    """

    def __init__(self, model: Any, strategy: RankStrategy) -> None:
        self._strategy = strategy
        for module in model.modules():
            if isinstance(module, FusedMoE) and module.layer_id in strategy.told:
                module.bind_full_expert_weights({})
        set_global_dwdp_manager(self)

    def prefetch_first_layers(self) -> None:
        """A forward pass begins."""
        self._strategy.pass_begins()

    def wait_prefetch(self, layer_id: int) -> None:
        """The layer's experts are about to be used."""
        self._strategy.layer_begins(layer_id)

    def record_compute_and_prefetch_next(self, layer_id: int) -> None:
        """The layer's experts have been used."""
        self._strategy.layer_ended(layer_id)

    def cleanup(self) -> None:
        """Nothing reads any more."""
        self._strategy.close()
