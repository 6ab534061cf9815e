"""bench/paper.py without servers: what it concludes from a record, its fit of the simulator, and its seams upstream."""

from __future__ import annotations

import importlib
import math
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncep.sim import hardware
from asyncep.sim.calibration import Calibration, MeasuredStep, compare

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def paper() -> Iterator[Any]:
    """Imports a bench's module by name."""
    sys.path[:0] = [str(BENCH), str(BENCH / "baselines")]
    yield importlib.import_module
    del sys.path[:2]


def run(speed: float) -> dict[str, Any]:
    return {"tokens_per_s": speed}


def test_claims_are_medians_of_ratios_within_rounds_over_the_fastest(paper: Any) -> None:
    tables = paper("paper_tables")
    raw = {
        "runs": {
            # Slow in the second round, and so is everybody else then: ratios hold.
            "mix": {
                tables.OURS: [run(300), run(150)],
                "TP-2": [run(100), run(50)],
                "EP-2": [run(200), run(100)],
                "PP-2": [run(250), run(125)],
            }
        },
        "objective_s": 2.0,
        "latencies": {tables.OURS: {"10.0": [1.0, 1.5]}, "PP-2": {"10.0": [1.0, 3.0]}},
        "expert_bytes": {tables.OURS: [50, 50], tables.DP: [100, 100]},
        "differences": {"mix": {"TP-2": {"mean": 0.01, "max": 0.1, "between_prompts": 1.0}}},
        "calibration": [{"strategy": "tp", "tokens": 512, "measured": 1.0, "simulated": 0.8, "error": -0.2}],
    }
    claims = {claim.name: claim for claim in tables.claims_of(raw)}
    best = claims["tokens/s of AsyncEP over the best of TP, EP and DP-attention + EP, mix (EP-2)"]
    assert (best.value, best.holds) == (1.5, True)
    assert math.isclose(claims["tokens/s of AsyncEP over PP, mix (PP-2)"].value, 1.2)
    assert claims["goodput of AsyncEP over the best of TP, PP, EP, DP-attention + EP"].value == 2.0
    assert claims["expert bytes a host keeps over replicated DP's"].holds
    assert not claims["simulated against measured step, tp, 512 tokens"].holds
    assert not any("long" in name or "stock" in name for name in claims), "no figures, no claim"


def test_the_fit_finds_a_device_that_explains_the_steps(paper: Any, tmp_path: Path) -> None:
    fitting = paper("paper_fit")
    device = fitting.device_of([0.4, 60, 0.1, 200, 8e9, 3e-4, 8e-3], 1.3e12)
    link = hardware.Link("true", 7e7, 1e-4)
    true = Calibration(device, {"inside": link, "between": link}, ()).apply(hardware.cluster("cpu-core", 2))
    model = fitting.known_model()
    steps = []
    for strategy in ("replicated", "pp", "tp", "asyncep"):
        for tokens in (128, 256, 512, 1024, 2048, 4096):
            step = MeasuredStep(strategy, 2, ((tokens, 0),), 1.0)
            (found,) = compare(model, true, [step], skew=fitting.SKEW)
            steps.append(MeasuredStep(strategy, 2, step.passes, found.simulated))
    contents = fitting.calibrate(steps, 1.3e12, bandwidth=7e7, latency=1e-4)
    found = fitting.compared(fitting.write_calibration(tmp_path / "calibration.json", contents))
    assert len(found) == 24
    # Only the steps of replicated were fitted; the others are foretold.
    assert max(abs(one.error) for one in found if one.step.strategy == "replicated") < 0.01
    assert max(abs(one.error) for one in found) < 0.1
    with pytest.raises(ValueError, match="three"):
        fitting.fit(steps[:2], 1.3e12)


def test_every_side_differs_from_the_others_and_variants_change_something(paper: Any) -> None:
    sides = paper("paper_sides")
    assert len({side.name for side in sides.SIDES}) == len(sides.SIDES)
    unchanged, *variants = sides.variants(2000)
    assert all((side.flags, side.router) != (unchanged.flags, unchanged.router) for side in variants)
    assert {side.router[-1] for side in variants if "--without-rules" in side.router} == {"F1", "F2", "F3"}


def test_what_the_baselines_repair_is_still_there_upstream(paper: Any) -> None:
    for target, hook, _ in paper("asyncep_baselines").REPAIRS:
        assert callable(pkgutil.resolve_name(target)), target
        assert callable(hook)
