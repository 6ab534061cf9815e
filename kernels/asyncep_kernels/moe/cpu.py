"""``moe`` on CPUs: in C where `cpu_native` serves, else out of torch's own operators, which is what this file has: the
expert GEMMs (oneDNN for bf16) and little beside them.

Weights are read as they lie. oneDNN would also take them repacked, which measures 0 to 3 % faster and would cost
every rank a private copy of all experts; see docs/cpu.md.

oneDNN compiles a kernel for every new shape, 0.6 ms each, more than such a GEMM takes; and its cache holds 1,024.
Routing makes every row count occur, so an expert's rows go in blocks whose size is one of a few.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from asyncep_kernels.moe import cpu_native
from asyncep_kernels.moe.quant import Format, dequantize_weight
from asyncep_kernels.moe.ready import Ready
from asyncep_kernels.moe.reference import as_quantized
from asyncep_kernels.moe.table import ExpertTable, check
from asyncep_kernels.workspace import Workspace

# Rows of a GEMM: blocks of BLOCK_ROWS and a rest rounded up to ROW_STEP. The rows too many are computed for nothing.
BLOCK_ROWS = 512
ROW_STEP = 16


class Routing(NamedTuple):
    """Assignments (token, k) ordered by expert."""

    tokens: torch.Tensor
    """``(A,)`` int64: the token of each kept assignment, expert after expert."""
    rows: torch.Tensor
    """``(T, K)`` int64: where in that order each assignment stands; A for an ignored one."""
    counts: list[int]
    """Assignments of each expert."""


def route(topk_ids: torch.Tensor, experts: int) -> Routing:
    """Orders the assignments by expert, tokens ascending within each.

    Args:
        topk_ids: ``(T, K)``, integers in [-1, experts).

    Raises:
        ValueError: an id is ``experts`` or more.
    """
    flat = topk_ids.reshape(-1)
    counts = torch.bincount(flat + 1, minlength=experts + 1).tolist()
    if len(counts) > experts + 1:
        raise ValueError(f"expert id {len(counts) - 2}, but there are {experts} experts")
    ignored = counts.pop(0)
    order = torch.argsort(flat, stable=True)  # ignored ones first
    kept = flat.numel() - ignored
    rows = torch.empty_like(order)
    rows[order] = torch.arange(-ignored, kept)
    if ignored:
        rows[rows < 0] = kept
        order = order[ignored:]
    return Routing(order.div(topk_ids.shape[1], rounding_mode="floor"), rows.view(topk_ids.shape), counts)


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
    """``moe`` of `asyncep_kernels.moe.reference`, for fp32 and bf16 on CPUs.

    In bf16 the gate and up projections, the gated product and each expert's output are rounded to bf16 as a layer
    of torch modules would; the weighted sum over a token's experts is taken in fp32 and rounded once. Against the
    reference: within 2 % of the largest output for bf16, 1e-5 for fp32.

    Quantised experts are widened to fp32 one at a time and multiplied with what the quantised activations stand for,
    for checks rather than for speed; within 2 %. Experts are awaited in ascending order, whatever ``ready.order`` is.

    Args, errors: as the reference. ``workspace`` keeps the scratch memory (``T * K * H`` elements and one block's
    activations) for the next call; ``out`` may be ``hidden`` itself.
    """
    check(hidden, topk_ids, topk_weights, experts)
    workspace = workspace or Workspace()
    if ready is None and cpu_native.serves(hidden, experts):
        return cpu_native.moe(hidden, topk_ids, topk_weights, experts, out, workspace)
    w13, w2 = experts.entries()
    w13_scale, w2_scale = experts.scales()
    form = experts.format if quantize_activations else Format.PLAIN
    dtype = hidden.dtype if experts.format is Format.PLAIN else torch.float32
    given = as_quantized(hidden, form).to(dtype)
    routing = route(topk_ids, len(w13))
    width, inter = hidden.shape[1], w2[0].shape[1]
    kept = routing.tokens.numel()
    # Beyond the assignments: room for a rounded-up block, whose first row is zeroed in the end for the ignored ones.
    results = workspace.take("moe.results", (kept + ROW_STEP, width), dtype)
    gathered = workspace.take("moe.gathered", (BLOCK_ROWS, width), dtype)
    activations = workspace.take("moe.activations", (BLOCK_ROWS, 2 * inter), dtype)
    end = 0
    for expert, count in enumerate(routing.counts):
        start, end = end, end + count
        if count == 0 or (ready is not None and not ready.await_expert(expert)):
            continue
        first_weight, second_weight = w13[expert], w2[expert]
        if w13_scale is not None and w2_scale is not None:
            first_weight = dequantize_weight(first_weight, w13_scale[expert], parts=2)
            second_weight = dequantize_weight(second_weight, w2_scale[expert])
        for first in range(start, end, BLOCK_ROWS):
            rows = min(BLOCK_ROWS, end - first)
            rounded = -(-rows // ROW_STEP) * ROW_STEP
            torch.index_select(given, 0, routing.tokens[first : first + rows], out=gathered[:rows])
            gate_up = activations[:rounded]
            torch.mm(gathered[:rounded], first_weight.t(), out=gate_up)
            gate, up = gate_up[:, :inter], gate_up[:, inter:]
            F.silu(gate, inplace=True).mul_(up)
            if form is not Format.PLAIN:
                gate = as_quantized(gate, form)
            # What this writes beyond its own rows, the next block overwrites.
            torch.mm(gate, second_weight.t(), out=results[first : first + rounded])
    results[kept].zero_()
    return _combine(results, routing.rows, topk_weights, hidden.dtype, out)


def _combine(
    results: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None
) -> torch.Tensor:
    """``out[t] = sum_k weights[t, k] * results[rows[t, k]]`` in one pass, without a permuted copy.

    ``embedding_bag`` accumulates in fp32 and wants weights of the table's dtype. A bf16 weight alone would be off by
    up to 0.2 %, so each is given as the sum of two bf16 numbers (16 bits of significand) and its row is read twice.
    """
    if results.dtype != torch.float32:
        high = weights.to(results.dtype)
        low = (weights - high).to(results.dtype)
        weights = torch.stack((high, low), dim=-1).flatten(1)
        rows = rows.repeat_interleave(2, dim=1)
    summed = F.embedding_bag(rows, results, mode="sum", per_sample_weights=weights.to(results.dtype).contiguous())
    return summed.to(dtype) if out is None else out.copy_(summed)
