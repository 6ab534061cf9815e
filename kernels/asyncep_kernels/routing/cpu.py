"""``route`` on CPUs: in C where the machine has AVX512-BF16, else torch's top-k."""

from __future__ import annotations

import torch

from asyncep_kernels.native.library import library, split
from asyncep_kernels.routing.reference import check


def route(logits: torch.Tensor, k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``route`` of `asyncep_kernels.routing.reference`, weights to 1e-6.

    Args, errors: as the reference. Without the C kernel, of equal logits either may come first.
    """
    check(logits, k)
    kernels = library()
    if kernels is None or logits.stride(1) != 1 or logits.dtype not in (torch.bfloat16, torch.float32):
        weights, ids = torch.topk(logits.float().softmax(dim=-1), k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, ids.int()
    tokens, experts = logits.shape
    weights = torch.empty(tokens, k)
    ids = torch.empty(tokens, k, dtype=torch.int32)
    narrow = int(logits.dtype == torch.bfloat16)
    split(
        tokens,
        lambda first, last: kernels.asyncep_route_softmax(
            *(logits.data_ptr(), logits.stride(0), narrow, experts, k, int(renormalize), first, last),
            *(ids.data_ptr(), weights.data_ptr()),
        ),
    )
    return weights, ids
