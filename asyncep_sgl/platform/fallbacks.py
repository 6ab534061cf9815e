"""Torch versions of operations that the pinned SGLang has as Triton kernels only, on paths a CPU takes."""

from __future__ import annotations

import torch


def fused_gate_sigmoid_mul(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    output: torch.Tensor,
    *,
    do_add: bool,
) -> None:
    """The shared expert of Qwen2-MoE, weighted by its gate: ``output (+)= sigmoid(hidden @ gate) * shared``.

    Args:
        hidden_states: ``(tokens, hidden)``.
        gate_weight: ``(hidden,)``.
        shared_output: ``(tokens, hidden)``.
        output: ``(tokens, hidden)``, written in place; added to when ``do_add``.
    """
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.float()).unsqueeze(-1)
    weighted = gate * shared_output.float()
    output.copy_(weighted + output.float() if do_add else weighted)
