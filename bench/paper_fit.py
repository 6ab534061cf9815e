"""The simulator's device fitted to one strategy's measured steps, and its figures for the others beside theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.optimize import least_squares

from asyncep.sim import hardware
from asyncep.sim.calibration import Calibration, Comparison, MeasuredStep, compare, read_calibration
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.work import Model

MACHINE, MODEL = "cpu-core", "qwen3-147m"
FITTED = "replicated"
# Name, where the search starts, and how loosely it is held there.
_START = (
    ("gemm_top", 0.6, 6.0),
    ("gemm_half", 30.0, 3.0),
    ("attention_top", 0.15, 6.0),
    ("attention_half", 300.0, 3.0),
    ("memory_bandwidth", 10e9, 3.0),
    ("layer_seconds", 5e-4, 3.0),
    ("step_seconds", 5e-3, 3.0),
)
# Random routers choose nearly evenly.
SKEW = ExpertSkew(1.2)


def device_of(values: Sequence[float], peak: float) -> dict[str, Any]:
    """The calibration file's device from the fitted numbers."""
    named = dict(zip((name for name, _, _ in _START), values, strict=True))
    return {
        "name": "cpu-core, calibrated",
        "peak": {"bf16": peak},
        "gemm": {"bf16": {"top": min(1.0, named["gemm_top"]), "half": named["gemm_half"]}},
        "attention": {"top": min(1.0, named["attention_top"]), "half": named["attention_half"]},
        "memory_bandwidth": named["memory_bandwidth"],
        "layer_seconds": named["layer_seconds"],
        "step_seconds": named["step_seconds"],
    }


def steps_of(timed: Mapping[str, Mapping[str, float]], strategies: Mapping[str, str]) -> list[MeasuredStep]:
    """Steps as the simulator names them. `timed`: side -> tokens -> seconds. `strategies`: side -> its name."""
    return [
        MeasuredStep(strategies[side], 2, ((int(tokens), 0),), seconds)
        for side, by_tokens in timed.items()
        for tokens, seconds in by_tokens.items()
    ]


def fit(steps: Sequence[MeasuredStep], peak: float) -> dict[str, Any]:
    """The device with which the simulator is closest to `steps` of replicated ranks; relative errors count alike.

    Raises:
        ValueError: fewer than three steps.
    """
    if len(steps) < 3:
        raise ValueError(f"{len(steps)} steps of replicated ranks: a fit needs three")
    model = known_model()
    cluster = hardware.cluster(MACHINE, 2)
    start = [math.log(value) for _, value, _ in _START]

    def errors(logs: Sequence[float]) -> list[float]:
        calibrated = Calibration(device_of([math.exp(x) for x in logs], peak), {}, ()).apply(cluster)
        found = compare(model, calibrated, steps, skew=SKEW)
        pulled = [(x - x0) / (20 * width) for x, x0, (_, _, width) in zip(logs, start, _START, strict=True)]
        return [math.log1p(one.error) for one in found] + pulled

    solution = least_squares(errors, start)
    return device_of([math.exp(x) for x in solution.x], peak)


def calibrate(steps: Sequence[MeasuredStep], peak: float, bandwidth: float, latency: float) -> dict[str, Any]:
    """A calibration file's contents. `bandwidth`: bytes/s of the link as gathers reach it; `latency`: seconds."""
    device = fit([step for step in steps if step.strategy == FITTED], peak)
    link = {"bandwidth": bandwidth, "latency": latency}
    return {
        "machine": MACHINE,
        "model": MODEL,
        "skew": SKEW.ratio,
        "device": device,
        "links": {"inside": link, "between": link},
        "steps": [
            {"strategy": s.strategy, "ranks": s.ranks, "passes": [list(p) for p in s.passes], "seconds": s.seconds}
            for s in steps
        ],
    }


def compared(file: Path) -> list[Comparison]:
    """Simulated against measured, of every step in a calibration file."""
    found = read_calibration(file)
    cluster = found.apply(hardware.cluster(found.machine, 2))
    return compare(known_model(), cluster, found.steps, skew=found.skew)


def known_model() -> Model:
    """The model of all figures on CPUs."""
    return Model.from_config(MODEL, hardware.model_config(MODEL), "bf16")


def write_calibration(path: Path, contents: Mapping[str, Any]) -> Path:
    """Writes the file `bench/sim.py --calibration` and `asyncep plan --calibration` read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=1))
    return path
