"""The bench's pieces: what it compares is what it says, and its pictures come from the record."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "bench"))

import sim as bench
import sim_cases as cases
import sim_plots as plots

from asyncep.sim import hardware
from asyncep.sim.paper_mix import real_mix
from asyncep.sim.skew import ExpertSkew

MODEL = cases.model_of("qwen3-30b-a3b", "bf16")


def test_a_case_has_every_strategy_and_leads_are_ratios(tmp_path: Path) -> None:
    prompts = real_mix(seed=1, scale=0.002)
    case = cases.compare_strategies(MODEL, hardware.cluster("h100", 2), prompts, ExpertSkew(), shares=True)
    assert set(case) == {"asyncep", "asyncep-collective", "replicated", "tp", "pp", "ep", "dp-ep"}
    best, factor = bench.lead(case)
    assert factor == case["asyncep"]["tokens_per_second"] / case[best]["tokens_per_second"]
    assert all(
        case["asyncep"]["tokens_per_second"] / case[one]["tokens_per_second"] >= factor for one in bench.BASELINES
    )
    refused = {**case, "asyncep": {"refused": "too large"}}
    assert bench.lead(refused)[1] != bench.lead(refused)[1]  # nan: no figure, and no claim holds


def test_pictures_are_drawn_from_the_record(tmp_path: Path) -> None:
    speeds = {name: {"tokens_per_second": 10.0 + i} for i, name in enumerate(plots.COLOURS)}
    raw = {
        "papers": {"qwen3-235b-a22b on 8xh100 bf16": {"mix": {**speeds, "ep": {"refused": "too large"}}}},
        "devices": [{"name": "asyncep, one group", "devices": n, "per_device": 1.0} for n in (1, 2)],
        "links": {"512": [{"bandwidth": 1e9, "asyncep": 1.0, "tp": None}, {"bandwidth": 2e9, "asyncep": 2.0}]},
        "backlog": {"512": [{"tokens": 10, "asyncep": 1.0}]},
    }
    paths = plots.draw(raw, tmp_path)
    assert len(paths) == 4
    assert all(path.stat().st_size > 1000 for path in paths)


@pytest.mark.parametrize("backlog", [1024, 100_000])
def test_a_backlog_bounds_every_strategys_batches(backlog: int) -> None:
    profile = cases.Profile.of(MODEL, real_mix(seed=1, scale=0.001))
    cluster = hardware.cluster("h100", 4)
    for strategy, lanes in (("asyncep", 4), ("tp", 1), ("pp", 4), ("dp-ep", 4)):
        best = cases.best_steady(strategy, MODEL, cluster, profile, backlog=backlog)
        assert best is not None
        assert best.lane_tokens * lanes <= backlog
