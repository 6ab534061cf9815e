"""Calibration files: what they change, what they refuse, and that errors are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncep.sim import hardware
from asyncep.sim.calibration import MeasuredStep, compare, read_calibration
from asyncep.sim.errors import DataError
from asyncep.sim.kernels import Kernels
from asyncep.sim.work import Batch, Model

MODEL = Model.from_config("qwen3-30b-a3b", hardware.model_config("qwen3-30b-a3b"))


def written(folder: Path, table: Any) -> Path:
    path = folder / "calibration.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


def test_measured_figures_replace_known_ones(tmp_path: Path) -> None:
    table = {
        "device": {"peak": {"bf16": 1e12}, "gemm": {"bf16": {"points": [[64, 0.25], [256, 0.5]]}}, "step_seconds": 0.5},
        "links": {"inside": {"bandwidth": 95e6, "latency": 1e-4}},
        "steps": [{"strategy": "tp", "ranks": 2, "passes": [[512, 0]], "seconds": 2}],
    }
    calibration = read_calibration(written(tmp_path, table))
    before = hardware.cluster("cpu-core", 2)
    after = calibration.apply(before)
    assert after.device.peak["bf16"] == 1e12
    assert after.device.gemm["bf16"].at(256) == pytest.approx(0.5)
    assert after.device.step_seconds == 0.5
    assert after.device.attention == before.device.attention
    assert (after.inside.bandwidth, after.between) == (95e6, before.between)
    assert calibration.steps == (MeasuredStep("tp", 2, ((512, 0),), 2.0),)


def test_errors_are_relative_to_what_was_measured() -> None:
    cluster = hardware.cluster("cpu-core", 2)
    kernels = Kernels(cluster.device, MODEL)
    batch = Batch.of(MODEL, [(512, 0), (100, 400)])
    alone = 48 * sum(kernels.whole_layer(0, batch)) + kernels.head(batch)
    passes = ((512, 0), (100, 400))
    exact, half = compare(
        MODEL, cluster, [MeasuredStep("replicated", 1, passes, alone), MeasuredStep("replicated", 1, passes, 2 * alone)]
    )
    assert exact.error == pytest.approx(0, abs=1e-9)
    assert half.error == pytest.approx(-0.5)


@pytest.mark.parametrize("strategy", ["tp", "pp", "ep", "dp-ep", "asyncep", "asyncep-collective"])
def test_every_strategy_can_be_compared(strategy: str) -> None:
    step = MeasuredStep(strategy, 2, ((512, 0),) * 4, 1.0)
    (comparison,) = compare(MODEL, hardware.cluster("cpu-core", 2), [step])
    assert comparison.simulated > 0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "not JSON"),
        ([], "object"),
        ({"speed": 1}, "speed"),
        ({"machine": "abacus"}, "machine: 'abacus'"),
        ({"model": "gpt-5"}, "model: 'gpt-5'"),
        ({"device": {"flops": 1}}, r"device\.flops"),
        ({"links": {"radio": {}}}, r"links\.radio"),
        ({"links": {"inside": {"latency": 1}}}, r"links\.inside"),
        ({"links": {"inside": {"bandwidth": 0}}}, "bandwidth"),
        ({"steps": [{"strategy": "tp"}]}, r"steps\[0\]"),
        ({"steps": [{"strategy": "tp", "ranks": 2, "passes": [[0, 0]], "seconds": 1}]}, r"steps\[0\]"),
    ],
)
def test_wrong_files_name_the_field(tmp_path: Path, table: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_calibration(written(tmp_path, table))


def test_wrong_device_figures_are_refused(tmp_path: Path) -> None:
    for row, message in (({"peak": {"bf16": "fast"}}, "fast"), ({"gemm": {"bf16": {"points": []}}}, "points")):
        calibration = read_calibration(written(tmp_path, {"device": row}))
        with pytest.raises(DataError, match=message):
            calibration.apply(hardware.cluster("cpu-core", 2))
    with pytest.raises(DataError, match="says nothing of h100"):
        calibration.apply(hardware.cluster("h100", 2))
    with pytest.raises(DataError, match="No such file"):
        read_calibration(tmp_path / "none.json")
