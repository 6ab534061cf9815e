"""The script for the first hour on a GPU, rehearsed; and what it compares with, held against the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


def rehearse(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200, cwd=ROOT)


def test_the_kernels_part_is_rehearsed(tmp_path: Path) -> None:
    parts = ("kernels", "arrival", "transport", "attention")
    done = rehearse("gpu_check.py", "--rehearse", "--out", str(tmp_path), "--parts", *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {check["part"] for check in record["checks"]} == set(parts)
    assert {check["outcome"] for check in record["checks"]} == {"passed"}
    report = (tmp_path / "gpu_check.md").read_text()
    assert report.startswith("GPU check: rehearsal on a CPU")
    assert all(check["name"] in report for check in record["checks"])


def test_the_bench_of_the_kernels_is_rehearsed() -> None:
    done = rehearse("gpu_bench.py", "--rehearse", "--parts", "kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((BENCH / "out/gpu_bench_rehearsal.json").read_text())
    assert {row["scheme"] for row in record["raw"]["kernels"]} == {"bf16", "fp8", "fp8-weights", "int8", "int8-weights"}
    assert record["claims"] == []  # a rehearsal claims nothing
    assert "figures void" in (BENCH / "out/gpu_bench_rehearsal.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do() -> None:
    for script in ("gpu_check.py", "gpu_bench.py"):
        done = rehearse(script)
        assert done.returncode == 1
        assert "--rehearse" in done.stderr


def test_a_failed_check_fails_the_command(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
sys.argv = ["gpu_check.py", "--rehearse", "--parts", "arrival", "--out", {str(tmp_path)!r}]
import gpu_check
def broken(bench):
    raise AssertionError("off by one")
gpu_check.check_arrival = broken
sys.exit(gpu_check.main())
"""
    environment = {**os.environ, "PYTHONPATH": str(BENCH)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "| failed | AssertionError: off by one |" in (tmp_path / "gpu_check.md").read_text()


def test_the_roofline_in_the_notes_is_what_the_cost_model_says() -> None:
    done = rehearse("gpu_roofline.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout in (ROOT / "docs/results/gpu.md").read_text(), "run bench/gpu_roofline.py --docs"


def test_what_the_check_compares_with_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from gpu_cases import case, error, expected

    from asyncep_kernels.moe import reference
    from asyncep_kernels.moe.configs import SCHEMES

    for scheme in SCHEMES.values():
        work = case(scheme, tokens=9, hidden=40, inter=24, experts=4, top_k=2, device="cpu", seed=5, skew=1.0)
        exact = reference.moe(
            work.hidden.float(), work.ids, work.weights, fp32(work.experts), quantize_activations=scheme.activations
        )
        assert error(expected(work), exact) < 1e-4


def fp32(table: object) -> object:
    from asyncep_kernels.moe.quant import Format
    from asyncep_kernels.moe.table import ExpertTable

    assert isinstance(table, ExpertTable)
    if table.format is not Format.PLAIN:
        return table
    return ExpertTable([weight.float() for weight in table.w13], [weight.float() for weight in table.w2])
