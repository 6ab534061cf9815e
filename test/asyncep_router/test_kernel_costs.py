"""Kernels' costs add up to the model's, and bounds are on the right side."""

from __future__ import annotations

import pytest
from model_configs import DEEPSEEK_V3, GPT_OSS_20B, QWEN3_30B, QWEN3_235B

from asyncep_router.cost import ModelCost, read_shape
from asyncep_router.cost.devices import A100, DEVICES, H100, Device, Number
from asyncep_router.cost.kernels import attention_kernel, gather_seconds, moe_kernels

MODELS = [QWEN3_235B, QWEN3_30B, DEEPSEEK_V3, GPT_OSS_20B]


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config["model_type"])
@pytest.mark.parametrize("number", list(Number))
def test_parts_add_up_to_the_cost_model(config: dict[str, object], number: Number) -> None:
    shape = read_shape(config)
    cost = ModelCost(shape, expert_itemsize=number.size)
    sparse = [layer for layer in shape.layers if layer.mlp.experts]
    tokens = 4096
    flops = sum(kernel.flops for layer in sparse for kernel in moe_kernels(shape, layer, tokens, number))
    assert flops == cost.expert_flops_per_token * tokens
    attention = sum(attention_kernel(shape, layer, 512, 8).flops for layer in shape.layers)
    assert attention == cost.attention_flops(512) * 8
    # Without tokens what is left to move is the weights.
    weights = sum(kernel.bytes for layer in sparse for kernel in moe_kernels(shape, layer, 0, number))
    assert weights == pytest.approx(cost.expert_bytes)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_few_tokens_are_bound_by_memory_and_many_by_compute(device: Device) -> None:
    shape = read_shape(QWEN3_235B)
    for tokens, bound in ((128, "memory"), (32768, "compute")):
        kernels = {k.name: k for k in moe_kernels(shape, shape.layers[0], tokens, Number.BF16)}
        assert kernels["gate-up, SiLU"].bound(device) == kernels["down"].bound(device) == bound
        assert kernels["unpermute"].bound(device) == "memory"


def test_a_gather_over_links_and_from_the_host() -> None:
    shape = read_shape(QWEN3_30B)
    link, host = gather_seconds(shape, shape.layers[0], Number.BF16, H100, 8)
    size = 3 * 2048 * 768 * 128 * 2 * 7 / 8
    assert (link, host) == (size / 450e9, size / 64e9)
    assert gather_seconds(shape, shape.layers[0], Number.FP8, H100, 8)[0] == link / 2
    assert gather_seconds(shape, shape.layers[0], Number.BF16, H100, 1) == (0.0, 0.0)


def test_e4m3_is_widened_where_it_cannot_be_multiplied() -> None:
    assert A100.product_rate(Number.FP8) == A100.product_rate(Number.BF16)
    assert H100.product_rate(Number.FP8) > H100.product_rate(Number.BF16)
