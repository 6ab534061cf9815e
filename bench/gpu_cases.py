"""Batches for checking and timing the GPU kernels: a layer of random experts and a routing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asyncep_kernels.moe.configs import MoeConfig, Scheme
from asyncep_kernels.moe.pointers import PointerTable, pointer_table
from asyncep_kernels.moe.quant import Format, dequantize_weight, quantize_weight
from asyncep_kernels.moe.reference import as_quantized
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.workspace import Workspace


@dataclass(frozen=True)
class Case:
    """One call of ``moe``."""

    scheme: Scheme
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    experts: ExpertTable
    table: PointerTable
    workspace: Workspace


def case(
    scheme: Scheme,
    *,
    tokens: int,
    hidden: int,
    inter: int,
    experts: int,
    top_k: int,
    device: str,
    seed: int,
    skew: float = 0.0,
) -> Case:
    """A batch on ``device``.

    Args:
        scheme: the experts' format, and whether activations are quantised.
        tokens, hidden, inter, experts, top_k: sizes.
        device: "cpu" or "cuda".
        seed: of everything.
        skew: 0 for even routing; at 1 expert e is as likely as 1 / (e + 1).
    """
    generator = torch.Generator(device).manual_seed(seed)
    likely = torch.arange(1, experts + 1, device=device, dtype=torch.float32).pow(-skew)
    ids = torch.multinomial(likely.expand(tokens, experts), top_k, generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator, device=device)
    x = torch.randn(tokens, hidden, generator=generator, device=device).bfloat16()
    sides: list[list[torch.Tensor]] = [[], [], [], []]
    for _ in range(experts):
        for side, (rows, columns, parts) in enumerate(((2 * inter, hidden, 2), (hidden, inter, 1))):
            full = torch.randn(rows, columns, generator=generator, device=device) / columns**0.5
            if scheme.weights is Format.PLAIN:
                sides[side].append(full.bfloat16())
            else:
                numbers, scale = quantize_weight(full, scheme.weights, parts)
                sides[side].append(numbers)
                sides[side + 2].append(scale)
    table = ExpertTable(sides[0], sides[1], sides[2] or None, sides[3] or None)
    return Case(scheme, x, ids, weights, table, pointer_table(table), Workspace())


def run(work: Case, config: MoeConfig | None = None) -> torch.Tensor:
    """The Triton kernels' output."""
    from asyncep_kernels.moe.triton import moe

    return moe(
        work.hidden,
        work.ids,
        work.weights,
        work.table,
        workspace=work.workspace,
        quantize_activations=work.scheme.activations,
        config=config,
    )


def expected(work: Case) -> torch.Tensor:
    """The output in fp32 by torch's own operators, expert by expert: the reference's meaning at full size.

    `test/bench/test_gpu_check.py` holds it against `asyncep_kernels.moe.reference`.
    """
    form = work.scheme.weights if work.scheme.activations else Format.PLAIN
    w13, w2 = work.experts.entries()
    w13_scale, w2_scale = work.experts.scales()
    x = as_quantized(work.hidden.float(), form)
    out = torch.zeros_like(x)
    for expert in range(len(w13)):
        token, k = (work.ids == expert).nonzero(as_tuple=True)
        if token.numel():
            first = dequantize_weight(w13[expert], w13_scale[expert] if w13_scale else None, parts=2)
            second = dequantize_weight(w2[expert], w2_scale[expert] if w2_scale else None)
            gate, up = (x[token] @ first.T).chunk(2, dim=1)
            result = as_quantized(torch.nn.functional.silu(gate) * up, form) @ second.T
            out.index_add_(0, token, result * work.weights[token, k, None])
    return out


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error over largest output; infinite where something is not finite."""
    if not bool(found.isfinite().all()):
        return float("inf")
    return ((found.float() - exact.float()).abs().max() / exact.float().abs().max().clamp(min=1e-6)).item()
