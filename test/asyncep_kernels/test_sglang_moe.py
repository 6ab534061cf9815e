"""The MoE hook against the SGLang function it stands in for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.fused_moe_native import moe_forward_native

from asyncep_sgl.rank.cpu_operators import around_moe_forward_native


def layer(dtype: torch.dtype, experts: int = 6) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    w13 = (torch.randn(experts, 64, 48, generator=generator) / 7).to(dtype)
    w2 = (torch.randn(experts, 48, 32, generator=generator) / 6).to(dtype)
    return SimpleNamespace(
        num_experts=experts,
        w13_weight=torch.nn.Parameter(w13, requires_grad=False),
        w2_weight=torch.nn.Parameter(w2, requires_grad=False),
    )


def config(**changed: Any) -> SimpleNamespace:
    fields = {
        "activation": "silu",
        "gemm1_alpha": None,
        "gemm1_clamp_limit": None,
        "apply_router_weight_on_input": False,
    }
    return SimpleNamespace(**{**fields, **changed})


def stock(layer: Any, x: torch.Tensor, topk: Any) -> torch.Tensor:
    """What `moe_forward_native` computes; itself it needs a running server's context for its activation."""
    weights, ids, _ = topk
    out = torch.zeros(x.shape)
    for token in range(x.shape[0]):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            gate, up = torch.nn.functional.linear(x[token], layer.w13_weight[expert]).chunk(2)
            out[token] += weight * torch.nn.functional.linear(
                torch.nn.functional.silu(gate) * up, layer.w2_weight[expert]
            )
    return out.to(x.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_hook_equals_upstream(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(50, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights, ids = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)).softmax(-1).topk(2)
    topk = (weights, ids.int(), None)
    found = around_moe_forward_native(_unwanted, layer(dtype), x, topk, config())
    try:
        expected = moe_forward_native(layer(dtype), x, topk, config())
    except (RuntimeError, ValueError, AssertionError):
        expected = stock(layer(dtype), x, topk)
    assert (found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()


@pytest.mark.parametrize(
    "changed", [{"activation": "gelu"}, {"gemm1_alpha": 1.7}, {"apply_router_weight_on_input": True}]
)
def test_what_the_kernel_does_not_serve_goes_upstream(changed: dict[str, Any]) -> None:
    x = torch.zeros(1, 48)
    found = around_moe_forward_native(lambda *_: x, layer(torch.float32), x, (x, x, None), config(**changed))
    assert found is x


def test_biased_experts_go_upstream() -> None:
    x, biased = torch.zeros(1, 48), layer(torch.float32)
    biased.w2_weight_bias = torch.zeros(6, 48)
    assert around_moe_forward_native(lambda *_: x, biased, x, (x, x, None), config()) is x


def _unwanted(*_: Any) -> torch.Tensor:
    raise AssertionError("went upstream")
