"""The seam on CUDA: our Triton kernel, in its interpreter, on the objects SGLang hands the hook."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cuda_layer
import pytest
import torch
from interpreted import interpreter

from asyncep_kernels.moe import reference
from asyncep_kernels.moe.table import ExpertTable
from asyncep_sgl.errors import SeamError
from asyncep_sgl.rank.cuda_operators import around_device_loading, around_forward_cuda


def test_the_hook_reads_experts_where_they_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    w13 = (torch.randn(6, 64, 48, generator=generator) / 7).bfloat16()
    w2 = (torch.randn(6, 48, 32, generator=generator) / 6).bfloat16()
    hidden = torch.randn(9, 48, generator=generator).bfloat16()
    weights, ids = torch.randn(9, 6, generator=generator).softmax(-1).topk(2)
    whole, *gathered = interpreter().call("cuda_layer", "forward", hidden, ids, weights, w13, w2)
    exact = reference.moe(hidden.float(), ids, weights, ExpertTable(w13.float(), w2.float()))
    assert (whole.float() - exact).abs().max() <= 0.02 * exact.abs().max()
    assert len(gathered) == 3
    for other in gathered:
        assert torch.equal(other, whole)


def dispatched(dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    return SimpleNamespace(hidden_states=torch.zeros(2, 48, dtype=dtype), hidden_states_scale=None, topk_output=None)


@pytest.mark.parametrize(
    "changed",
    [
        {"activation": "gelu"},
        {"is_gated": False},
        {"gemm1_alpha": 1.7},
        {"swiglu_limit": 7.0},
        {"no_combine": True},
        {"routed_scaling_factor": 2.5},
        {"apply_router_weight_on_input": True},
    ],
)
def test_other_experts_go_to_sglang_unless_they_are_gathered(changed: dict[str, Any]) -> None:
    weight = torch.zeros(2, 64, 48, dtype=torch.bfloat16)
    layer, method = cuda_layer.layer(weight, weight), cuda_layer.method(**changed)
    assert around_forward_cuda(lambda *_: "stock", method, layer, dispatched()) == "stock"
    with cuda_layer.gathering(), pytest.raises(SeamError, match="layer 3: SGLang's own operator would not see"):
        around_forward_cuda(lambda *_: "stock", method, layer, dispatched())


def test_fp32_goes_to_sglang() -> None:
    weight = torch.zeros(2, 64, 48)
    found = around_forward_cuda(
        lambda *_: "stock", cuda_layer.method(), cuda_layer.layer(weight, weight), dispatched(torch.float32)
    )
    assert found == "stock"


def test_experts_in_host_memory_are_not_brought_to_the_device_while_sglang_finishes_a_layer() -> None:
    seen = []
    device = torch.device("cuda", 0)
    for module in (
        SimpleNamespace(w13_weight=torch.zeros(1)),
        SimpleNamespace(w13_weight=torch.zeros(1, device="meta")),
    ):
        around_device_loading(lambda _module, where: seen.append(where), module, device)
    around_device_loading(lambda _module, where: seen.append(where), SimpleNamespace(), device)
    assert seen == [torch.device("cpu"), device, device]
