"""ASAP and AMoE: bounds, a case by hand, and the defragging score by its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep.sim import hardware
from asyncep.sim.hardware import Cluster, Link
from asyncep.sim.kernels import Kernels
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.strategies.amoe import Amoe, defragging_scores
from asyncep.sim.strategies.asap import Asap
from asyncep.sim.strategies.disaggregated import message_seconds
from asyncep.sim.work import Model, uniform

CONFIG = {**hardware.model_config("qwen3-30b-a3b"), "num_hidden_layers": 6, "num_experts": 16}
MODEL = Model.from_config("six layers", CONFIG)
DEVICE = hardware.machine("h100").device
KERNELS = Kernels(DEVICE, MODEL)
CLUSTER = Cluster(DEVICE, 4, Link("l", 3e11, 1e-6), per_node=8)
EVEN = ExpertSkew(1.0)


def test_one_batch_by_hand() -> None:
    """One batch alone runs in turn: attention, message, experts, message back."""
    batch = uniform(MODEL, 2048, 512)
    out = message_seconds(MODEL, CLUSTER, 2048, 2, 2)
    back = message_seconds(MODEL, CLUSTER, 1024, 2, 2)
    layer = KERNELS.attention(0, batch) + out + KERNELS.experts(0, 2048 * 8 / 2, 8) + back
    result = Asap(KERNELS, CLUSTER, 2, 2, EVEN).run([batch])
    assert result.seconds == pytest.approx(6 * layer + KERNELS.head(batch))
    assert result.launches == 6 * 2
    assert result.rows == pytest.approx(2048 * 8)


@pytest.mark.parametrize("system", [Asap, Amoe])
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_a_backlog_is_worked_off_and_bounded(system: type[Asap] | type[Amoe], ratio: float) -> None:
    batches = [uniform(MODEL, 2048, 512) for _ in range(7)]
    result = system(KERNELS, CLUSTER, 2, 2, ExpertSkew(ratio)).run(batches)
    assert result.tokens == 7 * 2048
    assert result.rows == pytest.approx(7 * 2048 * 8)
    assert 0 < result.attention_busy <= 1
    assert 0 < result.expert_busy <= 1
    assert result.seconds >= result.flops / (4 * DEVICE.peak["bf16"])


def test_two_batches_interleave() -> None:
    one = Asap(KERNELS, CLUSTER, 1, 2, EVEN).run([uniform(MODEL, 4096, 512)])
    two = Asap(KERNELS, CLUSTER, 1, 2, EVEN).run([uniform(MODEL, 4096, 512) for _ in range(2)])
    assert two.seconds < 1.8 * one.seconds
    large = Asap(KERNELS, CLUSTER, 1, 2, EVEN).run([uniform(MODEL, 32_768, 512) for _ in range(2)])
    alone = Asap(KERNELS, CLUSTER, 1, 2, EVEN).run([uniform(MODEL, 32_768, 512)])
    assert large.seconds == pytest.approx(2 * alone.seconds)  # above 16K tokens they do not


def test_queues_fuse_what_several_units_bring() -> None:
    batches = [uniform(MODEL, 512, 512) for _ in range(16)]
    result = Amoe(KERNELS, CLUSTER, 2, 2, ExpertSkew(), in_flight=4).run(batches)
    assert result.launches < 16 * 6 * 16
    alone = Amoe(KERNELS, CLUSTER, 2, 2, ExpertSkew(), in_flight=4).run(batches[:1])
    assert alone.launches == 6 * 16


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=7))
def test_the_score_is_the_definition(rows: list[list[int]]) -> None:
    scores = defragging_scores(np.array(rows, dtype=float))
    blocks = len(rows)
    for b, row in enumerate(rows):
        for e, queued in enumerate(row):
            wanted = queued + sum(0.8**k * sum(rows[(b + k) % blocks]) / 3 for k in range(1, 5))
            assert scores[b, e] == pytest.approx(wanted if queued else -1)
