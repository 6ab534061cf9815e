"""Replaces a device's and links' figures by measured ones, and holds simulated steps against measured ones.

The file, all parts optional:

    {"machine": "cpu-core", "model": "qwen3-147m", "skew": …,
     "device": {"name": …, "memory_bytes": …, "memory_bandwidth": …, "peak": {…}, "gemm": {"bf16": {"points": …}},
                "attention": {"points": …}, "glue": …, "narrow": …, "layer_seconds": …, "step_seconds": …},
     "links": {"inside": {"bandwidth": …, "latency": …}, "between": {…}, "host": {…}},
     "steps": [{"strategy": "asyncep", "ranks": 2, "passes": [[512, 0], …], "seconds": …}, …]}

`machine`: the known device that was measured; nothing else may be calibrated by it. `model`: a known model's name, of
the steps (both default to the emulated pair's). `skew`: tokens of their most popular expert over those of the least
(default: the paper's). Fields that are left out keep the known device's values. Points are
[rows per expert (attention: tokens of the sequence), share of peak]. A step is a batch in steady state, every rank
having one of `passes` (new and cached tokens of each request); TP, EP and PP share one batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from asyncep.sim.deployment import Settings, deploy
from asyncep.sim.errors import DataError
from asyncep.sim.hardware import Cluster, Device, Link, devices, models, read_curve, read_link
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.work import Batch, Model

_NUMBERS = ("memory_bytes", "memory_bandwidth", "glue", "narrow", "layer_seconds", "step_seconds")
_LINKS = ("inside", "between", "host")


@dataclass(frozen=True)
class MeasuredStep:
    """A measured batch: `seconds` between the ends of two equal batches. `passes`: (new, cached) tokens."""

    strategy: str
    ranks: int
    passes: tuple[tuple[int, int], ...]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """`error`: (simulated - measured) / measured."""

    step: MeasuredStep
    simulated: float

    @property
    def error(self) -> float:
        return (self.simulated - self.step.seconds) / self.step.seconds


@dataclass(frozen=True)
class Calibration:
    """What a calibration file says; empty parts change nothing."""

    device: Mapping[str, Any]
    links: Mapping[str, Link]
    steps: tuple[MeasuredStep, ...]
    machine: str = "cpu-core"
    model: str = "qwen3-147m"
    skew: ExpertSkew | None = None

    def apply(self, cluster: Cluster) -> Cluster:
        """The cluster with the measured figures. Raises `DataError` if another device was measured."""
        if cluster.device.name != self.machine:
            raise DataError(f"machine: {self.machine} was measured, which says nothing of {cluster.device.name}")
        links: dict[str, Any] = dict(self.links)
        return replace(cluster, device=_device(cluster.device, self.device), **links)


def read_calibration(path: Path) -> Calibration:
    """Raises `DataError`, which names the file and the field."""
    try:
        table = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(table, dict):
        raise DataError(f"{path}: expected an object")
    unknown = set(table) - {"machine", "model", "skew", "device", "links", "steps"}
    if unknown:
        raise DataError(
            f"{path}: unknown field {sorted(unknown)[0]!r}; known are machine, model, skew, device, links, steps"
        )
    machine, model = str(table.get("machine", "cpu-core")), str(table.get("model", "qwen3-147m"))
    for field, value, names in (("machine", machine, devices()), ("model", model, models())):
        if value not in names:
            raise DataError(f"{path}: {field}: {value!r} is not one of {', '.join(names)}")
    device = table.get("device", {})
    known = {"name", "peak", "gemm", "attention", *_NUMBERS}
    for field in device:
        if field not in known:
            raise DataError(f"{path}: device.{field}: unknown; known are {', '.join(sorted(known))}")
    links = {}
    for name, row in table.get("links", {}).items():
        if name not in _LINKS:
            raise DataError(f"{path}: links.{name}: known are {', '.join(_LINKS)}")
        try:
            links[name] = read_link(f"measured {name}", row)
        except DataError as error:
            raise DataError(f"{path}: links.{name}: {error}") from error
    steps = tuple(_step(path, i, row) for i, row in enumerate(table.get("steps", [])))
    try:
        skew = ExpertSkew(float(table["skew"])) if "skew" in table else None
    except (TypeError, ValueError, DataError) as error:
        raise DataError(f"{path}: skew: {error}") from error
    return Calibration(device, links, steps, machine, model, skew)


def compare(
    model: Model,
    cluster: Cluster,
    steps: Sequence[MeasuredStep],
    *,
    skew: ExpertSkew | None = None,
    settings: Settings | None = None,
) -> list[Comparison]:
    """Simulate the same steps and return the relative errors. `cluster` gives device and links; each step's ranks come
    from the step. Memory is not checked: the steps did run."""
    settings = replace(settings or Settings(), unlimited=True)
    return [Comparison(step, _simulated(model, cluster, step, skew, settings)) for step in steps]


def _simulated(
    model: Model, cluster: Cluster, step: MeasuredStep, skew: ExpertSkew | None, settings: Settings
) -> float:
    deployment = deploy(
        step.strategy, model, replace(cluster, devices=step.ranks), skew=skew, settings=settings, group=step.ranks
    )
    executor = deployment.make()[0]
    batch = Batch.of(model, step.passes)
    ready, ends = 0.0, [0.0]
    # A pipeline needs as many batches as stages to fill, gathers a few to settle.
    for _ in range(3 * step.ranks + 3):
        outcome = executor.run(ready, [batch] * executor.lanes)
        ready = outcome.ready
        ends.append(max(end for end in outcome.ends if end is not None))
    return ends[-1] - ends[-2]


def _device(device: Device, row: Mapping[str, Any]) -> Device:
    if not row:
        return device
    try:
        changes: dict[str, Any] = {field: float(row[field]) for field in _NUMBERS if field in row}
        if "attention" in row:
            changes["attention"] = read_curve(row["attention"])
        if "peak" in row:
            changes["peak"] = {**device.peak, **{dtype: float(value) for dtype, value in row["peak"].items()}}
        if "gemm" in row:
            changes["gemm"] = {**device.gemm, **{dtype: read_curve(value) for dtype, value in row["gemm"].items()}}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"calibrated device: {error}") from error
    return replace(device, name=str(row.get("name", f"{device.name}, calibrated")), **changes)


def _step(path: Path, index: int, row: Mapping[str, Any]) -> MeasuredStep:
    try:
        passes = tuple((int(new), int(cached)) for new, cached in row["passes"])
        step = MeasuredStep(str(row["strategy"]), int(row["ranks"]), passes, float(row["seconds"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: steps[{index}]: {error!r}") from error
    if step.seconds <= 0 or step.ranks < 1 or not passes or any(new < 1 or cached < 0 for new, cached in passes):
        raise DataError(f"{path}: steps[{index}]: seconds above 0, ranks of at least 1 and passes are needed")
    return step
