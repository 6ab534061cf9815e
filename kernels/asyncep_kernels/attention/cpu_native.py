"""``attention`` in C (`cpu.c`): bf16 on CPUs with AVX512-BF16 or AMX."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch

from asyncep_kernels.attention.batch import Batch
from asyncep_kernels.native.library import library, needed, share


class _CLayer(ctypes.Structure):
    """``struct layer`` of layer_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("q_row", "k_row", "v_row", "out_row")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "v_dim", "window")),
        ("scale", ctypes.c_float),
    )


class _CBatch(ctypes.Structure):
    """``struct batch`` of layer_kernels.h."""

    _fields_ = (
        ("groups", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("members", "shared", "query", "new_tokens", "prefix", "slot_start", "slots")
        ),
    )


class NativePlan(NamedTuple):
    """A batch as the C kernel reads it, made once and used by every layer."""

    batch: _CBatch
    tensors: tuple[torch.Tensor, ...]
    """Kept alive: the batch points into them."""


def serves(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether these tensors and this machine are the C kernel's."""
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        # The heads of a token lie side by side, whatever lies between tokens.
        and all(each.stride(2) == 1 and each.stride(1) == each.shape[2] for each in (q, k_cache, v_cache, out))
        and library() is not None
    )


def native_plan(batch: Batch, groups: list[tuple[list[int], int]]) -> NativePlan:
    """The batch with the sequences of each group side by side.

    Args:
        groups: indices of sequences, and how many of their first cache rows they have in common; a sequence in none
            of them is one of its own.
    """
    grouped = {index for members, _ in groups for index in members}
    everyone = [*groups, *(([index], 0) for index in range(len(batch.new)) if index not in grouped)]
    # The longest first, so that threads end together.
    everyone.sort(key=lambda group: -sum(batch.new[i] * (batch.new[i] + batch.prefix[i]) for i in group[0]))
    starts = [0]
    for new in batch.new:
        starts.append(starts[-1] + new)
    order = [index for members, _ in everyone for index in members]
    rows = [batch.slots[index][: batch.prefix[index] + batch.new[index]] for index in order]
    ends = [0]
    for members, _ in everyone:
        ends.append(ends[-1] + len(members))
    slot_starts = [0]
    for row in rows:
        slot_starts.append(slot_starts[-1] + row.numel())

    def numbers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    tensors = (
        numbers(ends),
        numbers([shared for _, shared in everyone]),
        numbers([starts[index] for index in order]),
        numbers([batch.new[index] for index in order]),
        numbers([batch.prefix[index] for index in order]),
        numbers(slot_starts),
        torch.cat(rows).long() if rows else numbers([]),
    )
    return NativePlan(_CBatch(len(everyone), *(tensor.data_ptr() for tensor in tensors)), tensors)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: NativePlan,
    *,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """``attention`` of `asyncep_kernels.attention.reference` where `serves` says yes; shapes have been checked.

    Weights are rounded to bf16 before they are divided by their sum; scores and sums are fp32. Within 1.5 % of the
    largest value. A token's result does not depend on the other sequences of the batch.

    Raises:
        MemoryError: no scratch memory.
    """
    kernels = needed()
    layer = _CLayer(
        *(each.data_ptr() for each in (q, k_cache, v_cache, out)),
        *(each.stride(0) for each in (q, k_cache, v_cache, out)),
        *(q.shape[1], k_cache.shape[1], q.shape[2], v_cache.shape[2], -1 if window is None else window),
        scale * math.log2(math.e),
    )
    share(lambda blocks: kernels.asyncep_attention(ctypes.byref(layer), ctypes.byref(plan.batch), blocks))
    return out
