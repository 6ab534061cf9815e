"""``moe`` on CPUs, in three stages (`stages.py`): in C where `cpu_native` serves, else out of torch's own operators,
which is what this file has: the expert GEMMs (oneDNN for bf16) and little beside them.

Weights are read as they lie. oneDNN would also take them repacked, which measures 0 to 3 % faster and would cost
every rank a private copy of all experts; see docs/internals/cpu_kernels.md.

oneDNN compiles a kernel for every new shape, 0.6 ms each, more than such a GEMM takes; and its cache holds 1,024.
Routing makes every row count occur, so an expert's rows go in blocks whose size is one of a few.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from asyncep_kernels.moe import cpu_native
from asyncep_kernels.moe.quant import Format, dequantize_weight
from asyncep_kernels.moe.ready import Ready
from asyncep_kernels.moe.reference import as_quantized
from asyncep_kernels.moe.stages import Sorted
from asyncep_kernels.moe.table import ExpertTable, check
from asyncep_kernels.native.library import library
from asyncep_kernels.workspace import Workspace

# Rows of a GEMM: blocks of BLOCK_ROWS and a rest rounded up to ROW_STEP. The rows too many are computed for nothing.
BLOCK_ROWS = 512
ROW_STEP = 16


def sort(topk_ids: torch.Tensor, experts: int, *, workspace: Workspace | None = None) -> Sorted:
    """Orders the assignments by expert, tokens ascending within each.

    Args:
        topk_ids: ``(T, K)``, integers in [-1, experts); -1 is ignored.
        experts: E.
        workspace: keeps the result for the next call, which overwrites it.

    Raises:
        ValueError: an id is ``experts`` or more.
    """
    workspace = workspace or Workspace()
    if library() is not None:
        return cpu_native.sort(topk_ids, experts, workspace)
    flat = topk_ids.reshape(-1)
    counts = torch.bincount(flat + 1, minlength=experts + 1)
    if len(counts) > experts + 1:
        raise ValueError(f"expert id {len(counts) - 2}, but there are {experts} experts")
    ignored = int(counts[0])
    order = torch.argsort(flat, stable=True)  # ignored ones first
    place = torch.empty(flat.shape, dtype=torch.int32)
    place[order] = torch.arange(-ignored, flat.numel() - ignored, dtype=torch.int32)
    tokens = order.roll(-ignored).div(topk_ids.shape[1], rounding_mode="floor").int()
    counts[0] = 0
    return Sorted(counts.cumsum(0), tokens, place.clamp_(min=-1).view(topk_ids.shape))


def run(
    hidden: torch.Tensor,
    order: Sorted,
    experts: ExpertTable,
    results: torch.Tensor,
    *,
    first: int = 0,
    last: int | None = None,
    workspace: Workspace | None = None,
    quantize_activations: bool = True,
    ready: Ready | None = None,
) -> None:
    """Computes the rows of experts ``first`` up to ``last``: ``w2[e] @ (silu(gate) * up)`` for each row's token.

    Rows of other experts are neither read nor written: runs may be computed in any order, and here or elsewhere.

    Args:
        hidden: ``(T, H)``, fp32 or bf16; where rows were sent here, those (`Sorted.arrived`).
        order: as `sort` gave it.
        experts: E experts; those of the run are read.
        results: ``(T * K, H)`` contiguous, of `results_dtype`: rows of the run are written.
        first, last: the run of experts; all by default.
        workspace: keeps the scratch memory.
        quantize_activations, ready: as for `moe`.
    """
    last = len(experts.w13) if last is None else last
    workspace = workspace or Workspace()
    if ready is None and cpu_native.serves(hidden, experts):
        cpu_native.run(hidden, order, experts, results, first, last)
        return
    w13, w2 = experts.entries()
    w13_scale, w2_scale = experts.scales()
    form = experts.format if quantize_activations else Format.PLAIN
    dtype = results_dtype(hidden, experts)
    given = as_quantized(hidden, form).to(dtype)
    width, inter = hidden.shape[1], w2[0].shape[1]
    gathered = workspace.take("moe.gathered", (BLOCK_ROWS, width), dtype)
    activations = workspace.take("moe.activations", (BLOCK_ROWS, 2 * inter), dtype)
    ragged = workspace.take("moe.ragged", (BLOCK_ROWS, width), dtype)
    starts = order.starts.tolist()
    for expert in range(first, last):
        start, end = starts[expert], starts[expert + 1]
        if start == end or (ready is not None and not ready.await_expert(expert)):
            continue
        first_weight, second_weight = w13[expert], w2[expert]
        if w13_scale is not None and w2_scale is not None:
            first_weight = dequantize_weight(first_weight, w13_scale[expert], parts=2)
            second_weight = dequantize_weight(second_weight, w2_scale[expert])
        for at in range(start, end, BLOCK_ROWS):
            rows = min(BLOCK_ROWS, end - at)
            rounded = -(-rows // ROW_STEP) * ROW_STEP
            torch.index_select(given, 0, order.tokens[at : at + rows], out=gathered[:rows])
            gate_up = activations[:rounded]
            torch.mm(gathered[:rounded], first_weight.t(), out=gate_up)
            gate, up = gate_up[:, :inter], gate_up[:, inter:]
            F.silu(gate, inplace=True).mul_(up)
            if form is not Format.PLAIN:
                gate = as_quantized(gate, form)
            if at + rounded <= starts[last]:
                # What this writes beyond its own rows, the next block of the run overwrites.
                torch.mm(gate, second_weight.t(), out=results[at : at + rounded])
            else:
                torch.mm(gate, second_weight.t(), out=ragged[:rounded])
                results[at : at + rows].copy_(ragged[:rows])


def results_dtype(hidden: torch.Tensor, experts: ExpertTable) -> torch.dtype:
    """Of the rows between `run` and `combine`."""
    return hidden.dtype if experts.format is Format.PLAIN else torch.float32


def combine(
    results: torch.Tensor,
    place: torch.Tensor,
    weights: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out[t] = sum_k weights[t, k] * results[place[t, k]]``; a place of -1 contributes nothing.

    Sums are taken in fp32 and rounded once.

    Args:
        results: ``(T * K, H)`` contiguous, all rows that ``place`` names written. Another row may be overwritten.
        place: ``(T, K)`` int32, of `Sorted`.
        weights: ``(T, K)``, floating point.
        dtype: of what is returned; that of ``results`` by default.
        out: ``(T, H)``, written and returned.
    """
    dtype = dtype or results.dtype
    if library() is not None and results.dtype is dtype is torch.bfloat16 and results.shape[1] % cpu_native.STEP == 0:
        out = torch.empty((len(place), results.shape[1]), dtype=dtype) if out is None else out
        cpu_native.combine(results, place, weights, out)
        return out
    if results.dtype != torch.float32:
        # `embedding_bag` wants weights of the table's dtype. A bf16 weight alone would be off by up to 0.2 %, so each
        # is given as the sum of two bf16 numbers (16 bits of significand) and its row is read twice.
        high = weights.to(results.dtype)
        low = (weights - high).to(results.dtype)
        weights = torch.stack((high, low), dim=-1).flatten(1)
        place = place.repeat_interleave(2, dim=1)
    ignored = place < 0
    if bool(ignored.any()):
        # Then a row is left over, and no assignment has the last one.
        results[-1].zero_()
        place = torch.where(ignored, len(results) - 1, place)
    summed = F.embedding_bag(place, results, mode="sum", per_sample_weights=weights.to(results.dtype).contiguous())
    return summed.to(dtype) if out is None else out.copy_(summed)


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
    if topk_ids.numel() == 0:
        return torch.zeros_like(hidden) if out is None else out.zero_()
    order = sort(topk_ids, len(experts.w13), workspace=workspace)
    results = workspace.take("moe.results", (topk_ids.numel(), hidden.shape[1]), results_dtype(hidden, experts))
    run(
        hidden,
        order,
        experts,
        results,
        workspace=workspace,
        quantize_activations=quantize_activations,
        ready=ready,
    )
    return combine(results, order.place, topk_weights, dtype=hidden.dtype, out=out)
