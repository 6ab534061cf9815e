"""What every bench writes beside its figures: the machine, the versions, and which claims hold."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

OUT = Path(os.environ.get("ASYNCEP_BENCH_OUT") or Path(__file__).parent / "out")


@dataclass(frozen=True)
class Claim:
    """A figure measured in this run beside what is wanted of it. ``at_least`` tells which way is good."""

    name: str
    value: float
    wanted: float
    unit: str
    at_least: bool = True

    @property
    def holds(self) -> bool:
        return self.value >= self.wanted if self.at_least else self.value <= self.wanted


def machine() -> dict[str, Any]:
    """CPU, cores and memory of this host."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": len(psutil.Process().cpu_affinity() or []),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average_1m": psutil.getloadavg()[0],
    }


def write(name: str, *, seed: int, raw: Any, claims: Iterable[Claim], path: Path | None = None) -> Path:
    """Writes ``bench/out/NAME.json``, or to ``path``, and returns where."""
    path = path or OUT / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "bench": name,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "versions": {package: version(package) for package in ("asyncep-sgl", "sglang", "torch", "transformers")},
        "python": platform.python_version(),
        "quick": "--quick" in sys.argv,
        "seed": seed,
        "raw": raw,
        "claims": [{**asdict(claim), "holds": claim.holds} for claim in claims],
    }
    path.write_text(json.dumps(record, indent=1))
    return path
