"""Quick modes of benches run, and write the record that every bench promises. Nothing here is about speed.

Left out: `router_decide` and `profile_cpu` (a minute each), and all that start several servers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
CLAIM = {"name": str, "value": float | int, "wanted": float | int, "unit": str, "at_least": bool, "holds": bool}


def run(out: Path, name: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A bench's process and the only record it wrote."""
    environment = {**os.environ, "ASYNCEP_BENCH_OUT": str(out)}
    command = [sys.executable, str(BENCH / f"{name}.py"), "--quick", *arguments]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    # 1: it ran and a claim does not hold, as a quick mode's need not.
    assert done.returncode in (0, 1), done.stderr[-3000:]
    (path,) = out.glob("*.json")
    return done, json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def check(record: dict[str, Any], name: str) -> None:
    """What every record has."""
    assert record["bench"].removesuffix("-quick") == name
    assert isinstance(record["seed"], int)
    assert {"sglang", "torch", "asyncep-sgl"} <= record["versions"].keys()
    assert {"cpu", "cores", "memory_bytes", "load_average_1m"} <= record["machine"].keys()
    assert record["when"].endswith("Z")
    assert record["raw"]
    assert record["claims"]
    for claim in record["claims"]:
        assert claim.keys() == CLAIM.keys()
        for key, kind in CLAIM.items():
            assert isinstance(claim[key], kind), (key, claim)
        assert math.isfinite(claim["value"])
        better = claim["value"] >= claim["wanted"] if claim["at_least"] else claim["value"] <= claim["wanted"]
        assert claim["holds"] == better


def test_kernels(tmp_path: Path) -> None:
    _, record = run(tmp_path, "kernels")
    check(record, "kernels")
    assert {"moe", "attention", "norm"} <= record["raw"].keys()


@pytest.mark.server
def test_prefill_scaling(tmp_path: Path) -> None:
    """The same server, loads and record as `prefill`, which starts six."""
    _, record = run(tmp_path, "prefill_scaling")
    check(record, "prefill_scaling")
    assert all(point["seconds"] for point in record["raw"]["points"])


def test_router_http(tmp_path: Path) -> None:
    _, record = run(tmp_path, "router_http", "--policies", "asyncep")
    check(record, "router_http")
    (result,) = record["raw"]["results"]
    assert result["statuses"] == {"200": 300}


@pytest.mark.server
def test_router_inside(tmp_path: Path) -> None:
    _, record = run(tmp_path, "router_inside")
    check(record, "router_inside")


@pytest.mark.server
def test_profile_processes(tmp_path: Path) -> None:
    """As it is and without the savings: the same answers."""
    _, record = run(tmp_path, "profile_processes", "--cases", "list 128")
    check(record, "profile_processes")
    by_side = record["raw"]["runs"]["list 128"]
    assert list(by_side) == ["ours", "without all"]
    assert by_side["ours"][0]["rank_ms"] > 0
    (apart,) = (claim for claim in record["claims"] if claim["name"].startswith("largest difference"))
    assert apart["holds"]
    assert record["raw"]["between_prompts"]["list 128"] > 10 * apart["value"]


@pytest.mark.server
def test_routers_in_front_of_the_same_ranks(tmp_path: Path) -> None:
    """Two sides, one start each; a peer that is not there is named, not counted."""
    sides = ("asyncep", "sglang round_robin (default)", "sglang_router cache_aware")
    absent = tmp_path / "nowhere"
    done, record = run(tmp_path, "router", "--peer", str(absent), "--sides", *sides)
    check(record, "router")
    raw = record["raw"]
    assert str(absent) in done.stdout.replace("\n", "")
    assert len(raw["left_out"]) == 1
    assert raw["sglang_router"] is None
    assert set(raw["runs"]) == set(raw["loads"])
    assert len(raw["loads"]) == 3
    for load, by_side in raw["runs"].items():
        assert list(by_side) == list(sides[:2])
        for (figures,) in by_side.values():
            cached = json.loads(figures["cached_tokens_by_request"])
            assert len(cached) == raw["loads"][load]["requests"]
            assert figures["flops_ratio"] > 0.999
            assert 1 <= figures["imbalance"] <= 2
            assert sum(figures["flops_by_rank"].values()) == figures["flops"]
    # Both sides gave the same answers, and wrong ones would have been seen.
    for by_side in raw["log_probability_differences"].values():
        for apart in by_side.values():
            assert apart["mean"] < 0.1 * apart["between_prompts"]
    names = [claim["name"] for claim in record["claims"]]
    assert any(name.startswith("requests/s of asyncep over sglang round_robin") for name in names)
    assert any(name.startswith("gain over a default scheduler, simulated") for name in names)
