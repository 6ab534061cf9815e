"""What ``moe`` means, in fp32 and one token at a time. Slow."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from asyncep_kernels.moe.quant import Format, dequantize_weight
from asyncep_kernels.moe.ready import Ready
from asyncep_kernels.moe.table import ExpertTable, check
from asyncep_kernels.quantize.reference import dequantize, quantize
from asyncep_kernels.workspace import Workspace


def moe(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: ExpertTable,
    *,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    quantize_activations: bool = True,
    ready: Ready | None = None,
) -> torch.Tensor:
    """``out[t] = sum_k topk_weights[t, k] * w2[e] @ (silu(gate) * up)`` with ``e = topk_ids[t, k]`` and
    ``gate, up = w13[e] @ hidden[t]``; an id of -1 contributes nothing.

    Args:
        hidden: ``(T, H)``, fp32 or bf16.
        topk_ids: ``(T, K)``, integers in [-1, E).
        topk_weights: ``(T, K)``, floating point.
        experts: E experts of ``hidden``'s dtype, or e4m3 or int8 with scales.
        out: ``(T, H)`` of ``hidden``'s dtype, written and returned; made when absent.
        workspace: unused here.
        quantize_activations: with e4m3 or int8 experts, ``hidden`` and ``silu(gate) * up`` become numbers of the
            experts' dtype before they are multiplied, as `asyncep_kernels.quantize` says; else they stay.
        ready: which experts may be read only once a flag is up. See `Ready`: the caller calls its ``check``.

    Raises:
        ValueError: shapes or dtypes do not fit, or an id is E or more.
    """
    check(hidden, topk_ids, topk_weights, experts)
    result = torch.zeros(hidden.shape, dtype=torch.float32)
    form = experts.format if quantize_activations else Format.PLAIN
    w13, w2 = experts.entries()
    w13_scale, w2_scale = experts.scales()
    for token, (ids, weights) in enumerate(zip(topk_ids.tolist(), topk_weights.tolist(), strict=True)):
        x = as_quantized(hidden[None, token].float(), form)[0]
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= len(w13):
                raise ValueError(f"expert id {expert}, but there are {len(w13)} experts")
            if expert < 0 or (ready is not None and not ready.await_expert(expert)):
                continue
            first = dequantize_weight(w13[expert], w13_scale[expert] if w13_scale else None, parts=2)
            second = dequantize_weight(w2[expert], w2_scale[expert] if w2_scale else None)
            gate, up = (first @ x).chunk(2)
            result[token] += weight * (second @ as_quantized((F.silu(gate) * up)[None], form)[0])
    if out is None:
        return result.to(hidden.dtype)
    return out.copy_(result)


def as_quantized(rows: torch.Tensor, form: Format) -> torch.Tensor:
    """Rows as they are after quantisation to ``form`` and back, in fp32; themselves for a plain one."""
    if form is Format.PLAIN:
        return rows
    group = form.group(rows.shape[1])
    return dequantize(*quantize(rows, form.dtype, group), group)
