"""The cost model's algebra, and the published figures of known models."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_configs import DEEPSEEK_V3, GPT_OSS_20B, LLAMA_8B, MODELS, QWEN3_30B, QWEN3_235B

from asyncep_router.cost import AttentionCounting, ModelCost
from asyncep_router.errors import ConfigError, UnsupportedModelError

COSTS = [ModelCost.from_config(config) for config in MODELS.values()] + [
    ModelCost.from_config(DEEPSEEK_V3, mla_absorbed=True)
]
costs = st.sampled_from(COSTS)
lengths = st.integers(0, 200_000)


def test_published_figures_of_qwen3_235b() -> None:
    cost = ModelCost.from_config(QWEN3_235B)
    assert cost.expert_bytes_per_layer / 1e9 == pytest.approx(4.83, abs=0.005)
    fp8 = ModelCost.from_config(QWEN3_235B, expert_itemsize=1)
    assert fp8.expert_bytes_per_layer / 1e9 == pytest.approx(2.42, abs=0.005)
    assert cost.linear_flops_per_token / 94 / 1e6 == pytest.approx(446, abs=1)
    for tokens, mega in ((4096, 67), (32768, 537), (131072, 2147)):
        mean = cost.attention_flops(tokens) / 94 / tokens / 1e6
        assert mean == pytest.approx(mega, rel=0.01)
    assert cost.weight_bytes / 2 / 1e9 == pytest.approx(235, rel=0.005)


def test_published_sizes_of_other_models() -> None:
    assert ModelCost.from_config(QWEN3_30B).expert_bytes_per_layer / 1e9 == pytest.approx(1.21, abs=0.005)
    assert ModelCost.from_config(QWEN3_30B).weight_bytes / 2 / 1e9 == pytest.approx(30.5, rel=0.01)
    assert ModelCost.from_config(DEEPSEEK_V3).weight_bytes / 2 / 1e9 == pytest.approx(671, rel=0.005)
    assert ModelCost.from_config(GPT_OSS_20B).weight_bytes / 2 / 1e9 == pytest.approx(20.9, rel=0.01)
    assert ModelCost.from_config(LLAMA_8B).weight_bytes / 2 / 1e9 == pytest.approx(8.03, rel=0.005)
    # 512 + 64 elements a layer is DeepSeek's point: 70 KB a token for 61 layers.
    assert ModelCost.from_config(DEEPSEEK_V3).kv_bytes_per_token == 61 * 576 * 2
    assert ModelCost.from_config(LLAMA_8B).kv_bytes_per_token == 32 * 2 * 8 * 128 * 2


def test_saturation_threshold_of_8_h100() -> None:
    """PEERS: t_EP 5.9 ms of fp8 weights at 360 GB/s; peak-based T of about 14 TFLOP is 31K tokens."""
    cost = ModelCost.from_config(QWEN3_235B, expert_itemsize=1)
    t_ep = cost.expert_bytes_per_layer * 7 / 8 / 360e9
    assert t_ep == pytest.approx(5.9e-3, rel=0.02)
    threshold = t_ep * 1979e12 * 1.2
    assert threshold / 1e12 == pytest.approx(14, rel=0.02)
    # 31K tokens as several prompts of a few thousand tokens: attention adds a little to the 446 MFLOP.
    assert threshold / (cost.linear_flops_per_token / 94) == pytest.approx(31e3, rel=0.03)
    assert cost.threshold_flops(threshold) == pytest.approx(threshold * 94)


@given(costs, lengths, lengths, lengths)
def test_prefix_then_suffix_costs_the_whole(cost: ModelCost, head: int, tail: int, logits: int) -> None:
    whole = cost.flops(head + tail, 0, logits)
    assert whole == cost.flops(head, 0, 0) + cost.flops(tail, head, logits)


@given(costs, lengths, lengths, st.integers(1, 5000))
def test_monotone_in_both_arguments(cost: ModelCost, new: int, cached: int, more: int) -> None:
    assert cost.flops(new + more, cached) > cost.flops(new, cached)
    assert cost.flops(new, cached + more) >= cost.flops(new, cached)
    assert cost.bytes_read(new + more, cached) > cost.bytes_read(new, cached)
    assert cost.bytes_read(new, cached + more) > cost.bytes_read(new, cached)


@given(st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=60)
def test_windowed_attention_is_the_sum_over_tokens(new: int, cached: int) -> None:
    cost = ModelCost.from_config(GPT_OSS_20B)
    pairs = sum(12 * min(cached + i + 1, 128) + 12 * (cached + i + 1) for i in range(new))
    assert cost.attention_flops(new, cached) == 4 * 64 * 64 * pairs


def test_ten_requests_that_share_a_prefix_cost_one_prefix_and_ten_suffixes() -> None:
    cost = ModelCost.from_config(QWEN3_30B)
    together = cost.flops(4096, 0, 0) + cost.batch_flops([(100, 4096)] * 10)
    first_then_nine = cost.flops(4196, 0) + cost.batch_flops([(100, 4096)] * 9)
    assert together == first_then_nine


def test_square_counting_is_about_twice_the_triangle() -> None:
    causal = ModelCost.from_config(LLAMA_8B).attention_flops(4096)
    square = ModelCost.from_config(LLAMA_8B, counting=AttentionCounting.SQUARE).attention_flops(4096)
    assert square / causal == pytest.approx(2, rel=1e-3)


def test_expanding_cached_latents_is_counted_when_asked() -> None:
    plain = ModelCost.from_config(DEEPSEEK_V3)
    expanding = ModelCost.from_config(DEEPSEEK_V3, mla_expand_cached=True)
    per_token = 61 * 2 * 512 * 128 * (128 + 128)
    assert expanding.flops(10, 1000) - plain.flops(10, 1000) == 1000 * per_token


def test_unknown_model_and_bad_values_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="mamba9"):
        ModelCost.from_config({"model_type": "mamba9"})
    with pytest.raises(UnsupportedModelError, match="hidden_size"):
        ModelCost.from_config({k: v for k, v in LLAMA_8B.items() if k != "hidden_size"})
    with pytest.raises(ConfigError, match="kv_itemsize"):
        ModelCost.from_config(LLAMA_8B, kv_itemsize=0)


def test_importing_the_pure_half_is_quick_and_drags_nothing_in() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import asyncep_router.cost; "
        "took = time.perf_counter() - start; "
        "heavy = {'torch', 'zmq', 'sglang', 'numpy', 'transformers'} & set(sys.modules); "
        "print(took); sys.exit(1 if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.25
