"""Hooks that put our CPU kernels in the place of SGLang's torch-native operators.

Each takes the original first and calls it for whatever our kernel does not serve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from asyncep_kernels.moe import cpu as moe
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.norm import cpu as norm
from asyncep_kernels.rotary import cpu as rotary
from asyncep_kernels.routing import cpu as routing
from asyncep_kernels.workspace import Workspace
from asyncep_sgl.errors import SeamError
from asyncep_sgl.strategies import current
from asyncep_sgl.strategies.base import ExpertLayer, TopK

_SERVED = (torch.bfloat16, torch.float32)
# A rank computes one batch at a time, layer after layer: one workspace serves all layers.
_workspace = Workspace()


def around_moe_forward_native(
    original: Callable[..., torch.Tensor], layer: Any, x: torch.Tensor, topk_output: Any, moe_runner_config: Any
) -> torch.Tensor:
    """AROUND ``sglang.srt.layers.moe.fused_moe_native.moe_forward_native``: SiLU-gated experts without biases.

    Args:
        layer: a ``FusedMoE`` whose ``w13_weight`` is ``(E, 2I, H)`` and ``w2_weight`` ``(E, H, I)``.
        x: ``(T, H)``.

    Raises:
        SeamError: our kernels do not serve the layer and the strategy keeps its experts elsewhere.
    """
    strategy = current.rank()
    if not _is_ours(layer, x, moe_runner_config):
        if strategy is not None and not strategy.in_place(layer.layer_id):
            raise SeamError(f"layer {layer.layer_id}: SGLang's own operator would not see where its experts lie")
        return original(layer, x, topk_output, moe_runner_config)
    weights, ids, *_ = topk_output
    own = ExpertTable(layer.w13_weight.data, layer.w2_weight.data)
    if strategy is None:
        return _compute(x, TopK(ids, weights), own)
    return strategy.moe(ExpertLayer(layer.layer_id, own, _compute), x, TopK(ids, weights))


def _compute(hidden: torch.Tensor, topk: TopK, experts: ExpertTable) -> torch.Tensor:
    return moe.moe(hidden, topk.ids, topk.weights, experts, workspace=_workspace)


def _is_ours(layer: Any, x: torch.Tensor, config: Any) -> bool:
    """Whether these are SiLU-gated experts without biases, in the dtype of x."""
    biased = any(getattr(layer, name, None) is not None for name in ("w13_weight_bias", "w2_weight_bias"))
    return (
        config.activation == "silu"
        and config.gemm1_alpha is None
        and not config.apply_router_weight_on_input
        and not biased
        and x.dtype in _SERVED
        and layer.w13_weight.dtype == x.dtype
        and layer.w2_weight.dtype == x.dtype
    )


def register_fused_ops(platform_key: str) -> None:
    """Gives SGLang our norm and rotary embedding, where it looks for those of an out-of-tree platform."""
    # Imported only now: they must not be loaded before SGLang's hooks are applied.
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    BaseFusedOp.register_oot_forward(RMSNorm, rms_norm, platform_key)
    kinds = [RotaryEmbedding]
    for kind in kinds:
        kinds += kind.__subclasses__()
        # A kind with angles of its own is served, one with positions of its own is not.
        if kind.forward_native is RotaryEmbedding.forward_native:
            BaseFusedOp.register_oot_forward(kind, rotary_embedding, platform_key)


def rms_norm(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: Any = None,
) -> Any:
    """``forward`` of SGLang's ``RMSNorm``; with a residual in place, as on its other devices.

    Args:
        x: ``(..., H)``.
        residual: added first, and its sum returned beside the norm.
    """
    other = residual is not None and residual.dtype != x.dtype
    if post_residual_addition is not None or other or not _is_plain_norm(self, x):
        return self.forward_native(x, residual, post_residual_addition, quant_linear)
    normed, summed = norm.rms_norm(
        x, self.weight.data, self.variance_epsilon, residual, workspace=_workspace, consume=True
    )
    return normed if residual is None else (normed, summed)


def _is_plain_norm(layer: Any, x: torch.Tensor) -> bool:
    return (
        not layer.cast_x_before_out_mul
        and not layer.fp32_residual
        and layer.override_orig_dtype is None
        and layer.variance_size_override is None
        and x.dtype in _SERVED
    )


def around_apply_qk_norm(
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    q: torch.Tensor,
    k: torch.Tensor,
    q_norm: Any,
    k_norm: Any,
    head_dim: int,
    alt_stream: Any = None,
    allow_inplace: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """AROUND ``sglang.srt.models.utils.apply_qk_norm``: in place, where q and k lie in the joint projection.

    Args:
        q: ``(T, Hq * D)``; k: ``(T, Hkv * D)``.
    """
    if not (allow_inplace and q.dim() == k.dim() == 2 and all(_is_plain_norm(each, q) for each in (q_norm, k_norm))):
        return original(q, k, q_norm, k_norm, head_dim, alt_stream, allow_inplace)
    for x, layer in ((q, q_norm), (k, k_norm)):
        norm.rms_norm_heads_(x, layer.weight.data, layer.variance_epsilon, workspace=_workspace)
    return q, k


def rotary_embedding(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``forward`` of SGLang's ``RotaryEmbedding``, in place as on its other devices.

    Args:
        positions: ``(T,)``.
        query: ``(T, Hq * D)``; key: ``(T, Hkv * D)``.
    """
    plain = self.is_neox_style and offsets is None and positions.dim() == 1 and query.dim() == key.dim() == 2
    if not plain or query.dtype not in _SERVED or fused_set_kv_buffer_arg is not None:
        return self.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)  # type: ignore[no-any-return]
    table = getattr(self, "asyncep_table", None)
    if table is None or table.shape != self.cos_sin_cache.shape:  # it grows with the longest prompt seen
        table = self.asyncep_table = self.cos_sin_cache.float().contiguous()
    for x in (query, key):
        rotary.rotary_(x, positions, table, self.head_size)
    return query, key


def around_fused_topk(
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    correction_bias: torch.Tensor | None = None,
    scoring_func: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """AROUND ``sglang.srt.layers.moe.topk.fused_topk_native``.

    Args:
        gating_output: ``(T, E)``.

    Returns:
        ``(T, topk)`` fp32 weights and int32 experts.
    """
    if correction_bias is not None or scoring_func != "softmax" or gating_output.dtype not in _SERVED:
        return original(hidden_states, gating_output, topk, renormalize, correction_bias, scoring_func)
    return routing.route(gating_output, topk, renormalize)
