"""Our Triton experts in the place of SGLang's on CUDA. The kernel has not run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from asyncep_kernels.moe.pointers import PointerTable, pointer_table
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.workspace import Workspace
from asyncep_sgl.errors import SeamError

# A rank computes one batch at a time on one stream, layer after layer: one workspace serves all layers.
_workspace = Workspace()


def around_forward_cuda(original: Callable[..., Any], method: Any, layer: Any, dispatch_output: Any) -> Any:
    """AROUND ``UnquantizedFusedMoEMethod.forward_cuda``: SiLU-gated experts in bf16 without biases.

    Args:
        layer: a ``FusedMoE`` whose ``w13_weight`` is ``(E, 2I, H)`` and ``w2_weight`` ``(E, H, I)``; where experts are
            gathered, ``asyncep_experts`` is their table and the tensors have rows that must not be touched.
        dispatch_output: its ``hidden_states`` are ``(T, H)``.
    """
    hidden = dispatch_output.hidden_states
    table = getattr(layer, "asyncep_experts", None)
    if not _is_ours(method, layer, dispatch_output):
        if table is not None:
            raise SeamError(f"layer {layer.layer_id} gathers its experts, and SGLang's own operator would not see them")
        return original(method, layer, dispatch_output)
    weights, ids, *_ = dispatch_output.topk_output
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    from asyncep_kernels.moe.triton import moe

    return StandardCombineInput(
        hidden_states=moe(hidden, ids, weights, _pointers(layer, table, hidden.device), workspace=_workspace)
    )


def around_device_loading(original: Callable[..., Any], module: Any, target_device: torch.device) -> Any:
    """AROUND ``device_loading_context``: experts in host memory stay there while SGLang finishes a layer.

    It would bring them to the device and back into memory of this rank's own.
    """
    weight = getattr(module, "w13_weight", None)
    if weight is not None and weight.device.type == "cpu":
        return original(module, torch.device("cpu"))
    return original(module, target_device)


def _pointers(layer: Any, table: ExpertTable | None, device: torch.device) -> PointerTable:
    """Addresses of a table, made once for each layer and slot."""
    kept: dict[int, tuple[ExpertTable, PointerTable]] | None = getattr(layer, "asyncep_pointers", None)
    if kept is None:
        kept = layer.asyncep_pointers = {}
    key = 0 if table is None else id(table)
    if key not in kept:
        made = ExpertTable(layer.w13_weight.data, layer.w2_weight.data) if table is None else table
        # The table is kept too: another at its address would be taken for it.
        kept[key] = (made, pointer_table(made, device))
    return kept[key][1]


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
