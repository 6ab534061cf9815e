"""Our Triton experts in the place of SGLang's on CUDA. The kernel has not run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from asyncep_kernels.moe.pointers import PointerTable, pointer_table
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.workspace import Workspace
from asyncep_sgl.errors import SeamError
from asyncep_sgl.strategies import current
from asyncep_sgl.strategies.base import ExpertLayer, TopK

# A rank computes one batch at a time on one stream, layer after layer: one workspace serves all layers.
_workspace = Workspace()


def around_forward_cuda(original: Callable[..., Any], method: Any, layer: Any, dispatch_output: Any) -> Any:
    """AROUND ``UnquantizedFusedMoEMethod.forward_cuda``: SiLU-gated experts in bf16 without biases.

    Args:
        layer: a ``FusedMoE`` whose ``w13_weight`` is ``(E, 2I, H)`` and ``w2_weight`` ``(E, H, I)``.
        dispatch_output: its ``hidden_states`` are ``(T, H)``.

    Raises:
        SeamError: our kernel does not serve the layer and the strategy keeps its experts elsewhere.
    """
    hidden, strategy = dispatch_output.hidden_states, current.rank()
    if not _is_ours(method, layer, dispatch_output):
        if strategy is not None and not strategy.in_place(layer.layer_id):
            raise SeamError(f"layer {layer.layer_id}: SGLang's own operator would not see where its experts lie")
        return original(method, layer, dispatch_output)
    weights, ids, *_ = dispatch_output.topk_output
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    ours, topk = _expert_layer(layer), TopK(ids, weights)
    computed = ours.compute(hidden, topk, ours.own) if strategy is None else strategy.moe(ours, hidden, topk)
    return StandardCombineInput(hidden_states=computed)


def around_device_loading(original: Callable[..., Any], module: Any, target_device: torch.device) -> Any:
    """AROUND ``device_loading_context``: experts in host memory stay there while SGLang finishes a layer.

    It would bring them to the device and back into memory of this rank's own.
    """
    weight = getattr(module, "w13_weight", None)
    if weight is not None and weight.device.type == "cpu":
        return original(module, torch.device("cpu"))
    return original(module, target_device)


def _expert_layer(layer: Any) -> ExpertLayer:
    """A layer as its strategy sees it, made once: addresses are kept for each of its tables, one for each slot."""
    known: ExpertLayer | None = getattr(layer, "asyncep_layer", None)
    if known is not None:
        return known
    kept: dict[int, tuple[ExpertTable, PointerTable]] = {}

    def compute(hidden: torch.Tensor, topk: TopK, experts: ExpertTable) -> torch.Tensor:
        from asyncep_kernels.moe.triton import moe

        if id(experts) not in kept:
            # The table is kept too: another at its address would be taken for it.
            kept[id(experts)] = (experts, pointer_table(experts, hidden.device))
        return moe(hidden, topk.ids, topk.weights, kept[id(experts)][1], workspace=_workspace)

    own = ExpertTable(layer.w13_weight.data, layer.w2_weight.data)
    made = layer.asyncep_layer = ExpertLayer(layer.layer_id, own, compute)
    return made


def _is_ours(method: Any, layer: Any, dispatch_output: Any) -> bool:
    config = method.moe_runner_config
    hidden = dispatch_output.hidden_states
    return (
        config.activation == "silu"
        and config.is_gated
        and config.gemm1_alpha is None
        and config.gemm1_clamp_limit is None
        and config.swiglu_limit is None
        and not config.apply_router_weight_on_input
        and not config.no_combine
        and config.routed_scaling_factor in (None, 1.0)
        and not method.with_bias
        and not method.w13_swiglu_interleaved
        and dispatch_output.hidden_states_scale is None
        and hidden.dtype is torch.bfloat16
        and layer.w13_weight.dtype == hidden.dtype
    )
