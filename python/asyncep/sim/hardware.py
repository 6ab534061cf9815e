"""Devices, links and how they are put together. Figures come from `data/*.json`, each with its source."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from asyncep.sim.efficiency import Curve
from asyncep.sim.errors import DataError

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Device:
    """One accelerator (or one core).

    `peak`: FLOP/s by data type of the operands. `gemm`: share of that peak by data type, over rows (per expert).
    `attention`: share of the bf16 peak, over tokens of the sequence; attention runs in bf16 whatever the weights.
    `memory_bandwidth`: bytes/s. `glue`: share of it that element-wise operators reach. `narrow`: a product whose
    narrowest weight side is w reaches w / (w + narrow) of what a wide one does. `layer_seconds`: launches and
    gaps of a layer, `step_seconds`: of a batch.
    """

    name: str
    memory_bytes: float
    memory_bandwidth: float
    peak: Mapping[str, float]
    gemm: Mapping[str, Curve]
    attention: Curve
    glue: float = 0.7
    narrow: float = 64.0
    layer_seconds: float = 0.0
    step_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "memory_bandwidth", "glue"):
            if not getattr(self, name) > 0:
                raise DataError(f"device {self.name!r}: {name}={getattr(self, name)!r} must be above 0")
        for name in ("narrow", "layer_seconds", "step_seconds"):
            if not getattr(self, name) >= 0:
                raise DataError(f"device {self.name!r}: {name}={getattr(self, name)!r} must be at least 0")
        if "bf16" not in self.peak:
            raise DataError(f"device {self.name!r}: peak lacks bf16, in which attention runs")
        if set(self.peak) != set(self.gemm):
            raise DataError(
                f"device {self.name!r}: peak is given for {sorted(self.peak)}, gemm for {sorted(self.gemm)}"
            )

    def check_dtype(self, dtype: str) -> None:
        """Raises `DataError` for a data type without figures."""
        if dtype not in self.peak:
            raise DataError(f"device {self.name!r} has no figures for {dtype}; it has {', '.join(sorted(self.peak))}")


@dataclass(frozen=True)
class Link:
    """One device's way to others. `bandwidth`: bytes/s in each direction as really achieved; `latency`: seconds
    that a message takes before its first byte."""

    name: str
    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise DataError(f"link {self.name!r}: bandwidth={self.bandwidth!r} must be above 0")
        if not self.latency >= 0:
            raise DataError(f"link {self.name!r}: latency={self.latency!r} must be at least 0")


INFINITE = Link("infinite", math.inf, 0.0)


@dataclass(frozen=True)
class Cluster:
    """`devices` alike, `per_node` to a node; `inside` a node, `between` nodes (a device's own share), `host`: from
    host memory. `host_bytes`: host memory for each device, 0 for none."""

    device: Device
    devices: int
    inside: Link
    between: Link = INFINITE
    host: Link = INFINITE
    per_node: int = 8
    host_bytes: float = 0.0

    def __post_init__(self) -> None:
        if self.devices < 1 or self.per_node < 1:
            raise DataError(f"devices={self.devices!r}, per_node={self.per_node!r}: must be at least 1")


@dataclass(frozen=True)
class Machine:
    """What comes with a device unless something else is asked for."""

    device: Device
    inside: str
    between: str
    host: str
    per_node: int
    host_bytes: float
    sources: Mapping[str, str] = field(default_factory=dict)


def devices() -> tuple[str, ...]:
    """Names of known devices."""
    return tuple(_read("devices.json"))


def links() -> tuple[str, ...]:
    """Names of known links."""
    return tuple(_read("links.json"))


def models() -> tuple[str, ...]:
    """Names of known models."""
    return tuple(sorted(path.stem for path in (DATA / "models").glob("*.json")))


def model_config(name: str) -> dict[str, Any]:
    """A known model's configuration, shape fields only. Raises `DataError`."""
    if name not in models():
        raise DataError(f"model {name!r}: known are {', '.join(models())}")
    config: dict[str, Any] = json.loads((DATA / "models" / f"{name}.json").read_text())
    return config


def machine(name: str) -> Machine:
    """A known device and its surroundings. Raises `DataError`."""
    table = _read("devices.json")
    if name not in table:
        raise DataError(f"device {name!r}: known are {', '.join(table)}")
    row = dict(table[name])
    around = {key: row.pop(key) for key in ("inside", "between", "host", "per_node", "host_bytes")}
    return Machine(read_device(name, row), sources=row.get("sources", {}), **around)


def read_machine(name: str, row: Mapping[str, Any]) -> Cluster:
    """One device of somebody's own and its links, from the fields of `data/devices.json`.

    A link is a known one's name, or its ``bandwidth`` in bytes/s and ``latency`` in seconds. `between`, `host`,
    `per_node` (8) and `host_bytes` (0) may be left out.

    Raises:
        DataError: names the field.
    """
    missing = [field for field in ("memory_bytes", "memory_bandwidth", "peak", "gemm", "attention") if field not in row]
    if missing or "inside" not in row:
        raise DataError(f"device {name!r}: {', '.join([*missing, *([] if 'inside' in row else ['inside'])])} missing")
    links = {
        side: INFINITE
        if side not in row
        else link(row[side])
        if isinstance(row[side], str)
        else read_link(side, row[side])
        for side in ("inside", "between", "host")
    }
    try:
        around = {"per_node": int(row.get("per_node", 8)), "host_bytes": float(row.get("host_bytes", 0.0))}
    except (TypeError, ValueError) as error:
        raise DataError(f"device {name!r}: {error}") from error
    return Cluster(read_device(name, row), 1, links["inside"], links["between"], links["host"], **around)  # type: ignore[arg-type]


def link(name: str) -> Link:
    """A known link. Raises `DataError`."""
    table = _read("links.json")
    if name not in table:
        raise DataError(f"link {name!r}: known are {', '.join(table)}")
    return read_link(name, table[name])


def cluster(device: str, count: int, *, inside: Link | None = None, per_node: int | None = None) -> Cluster:
    """`count` of a known device with the links it comes with, or another one inside the node."""
    known = machine(device)
    return Cluster(
        known.device,
        count,
        inside or link(known.inside),
        link(known.between),
        link(known.host),
        per_node or known.per_node,
        known.host_bytes,
    )


def read_device(name: str, row: Mapping[str, Any]) -> Device:
    """A device from its fields; curves are given as `points` to fit, or as `top` and `half`. Raises `DataError`."""
    try:
        return Device(
            name=name,
            memory_bytes=float(row["memory_bytes"]),
            memory_bandwidth=float(row["memory_bandwidth"]),
            peak={dtype: float(value) for dtype, value in row["peak"].items()},
            gemm={dtype: read_curve(value) for dtype, value in row["gemm"].items()},
            attention=read_curve(row["attention"]),
            **{key: float(row[key]) for key in ("glue", "narrow", "layer_seconds", "step_seconds") if key in row},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"device {name!r}: {error!r}") from error


def read_link(name: str, row: Mapping[str, Any]) -> Link:
    """A link from its fields. Raises `DataError`."""
    try:
        return Link(name, float(row["bandwidth"]), float(row.get("latency", 0.0)))
    except (KeyError, TypeError) as error:
        raise DataError(f"link {name!r}: {error!r}") from error


def read_curve(row: Mapping[str, Any]) -> Curve:
    """From `{"points": [[x, share], …]}` or `{"top": …, "half": …}`. Raises `DataError`."""
    if "points" in row:
        return Curve.fit([(float(x), float(e)) for x, e in row["points"]])
    return Curve(float(row["top"]), float(row["half"]))


@lru_cache
def _read(name: str) -> Mapping[str, Any]:
    table: dict[str, Any] = json.loads((DATA / name).read_text())
    return table
