"""What ``attention`` means, in fp32 and one sequence at a time, with every mask written out. Slow."""

from __future__ import annotations

import torch

from asyncep_kernels.attention.batch import check
from asyncep_kernels.attention.plan import Plan
from asyncep_kernels.workspace import Workspace


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    new_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens over its prefix and themselves.

    Args:
        q: ``(T, Hq, D)``, fp32 or bf16: the new tokens, sequence after sequence.
        k_cache: ``(rows, Hkv, D)`` of ``q``'s dtype; the new tokens' keys are already in it. Query head h reads
            key head ``h // (Hq / Hkv)``.
        v_cache: ``(rows, Hkv, Dv)`` likewise.
        plan: the batch. With ``plan.window`` = w, a token sees itself and the w tokens before it.
        scale: of the scores, before the softmax.
        new_kv: ``(T, Hkv, D)`` and ``(T, Hkv, Dv)``: the new tokens' keys and values once more, not from the cache.
            They must be what the cache holds; an implementation reads whichever it likes.
        out: ``(T, Hq, Dv)`` of ``q``'s dtype, written and returned; made when absent.
        workspace: unused here.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    batch = plan.batch
    check(q, k_cache, v_cache, batch, plan.window)
    group = q.shape[1] // k_cache.shape[1]
    result = torch.empty(*q.shape[:2], v_cache.shape[2])
    start = 0
    for new, prefix, slots in zip(batch.new, batch.prefix, batch.slots, strict=True):
        rows = slots[: prefix + new].long()
        keys = k_cache[rows].float().repeat_interleave(group, dim=1)
        values = v_cache[rows].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[start : start + new].float(), keys) * scale
        behind = torch.arange(prefix, prefix + new)[:, None] - torch.arange(prefix + new)
        seen = behind >= 0 if plan.window is None else (behind >= 0) & (behind <= plan.window)
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        result[start : start + new] = torch.einsum("hqk,khd->qhd", weights, values)
        start += new
    return result.to(q.dtype) if out is None else out.copy_(result)
