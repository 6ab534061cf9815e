"""`asyncep plan`: the choice where it is known, what would change it, and every wrong flag by name."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asyncep.cli import main as asyncep
from asyncep.commands.plan import digits, main
from asyncep.plan.inputs import InputError, read_cluster, read_link, read_model, read_workload
from asyncep.plan.planner import Planner
from asyncep.sim import hardware
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.steady import Profile
from asyncep.sim.work import Model
from asyncep_sgl.launcher.command_line import parse

QWEN = ["--model", "qwen3-235b-a22b", "--gpus", "8xh100"]


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main([*flags, "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def test_asyncep_for_a_large_model_on_a_fast_link(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *QWEN, "--dtype", "fp8", "--workload", "mix")
    choice = plan["choice"]
    assert choice["strategy"] == "asyncep"
    assert choice["batch_tokens"] >= 8192
    assert choice["t_ep_seconds"] > 0
    assert 0.1 < choice["mfu"] < 0.7
    assert choice["memory"]["total"] <= 85.5e9
    assert [refusal["strategy"] for refusal in plan["refused"]] == ["replicated"]
    assert choice["tokens_per_second"] >= 0.97 * max(other["tokens_per_second"] for other in plan["others"])


def test_the_group_follows_the_link(capsys: pytest.CaptureFixture[str]) -> None:
    """A link a thousand times slower than NVLink: gathers cannot hide, a pipeline sends little and wins."""
    plan = planned(capsys, *QWEN, "--dtype", "fp8", "--workload", "512", "--link", "0.4GB/s", "--host-memory", "0")
    assert plan["choice"]["strategy"] == "pp"


def test_a_model_that_fits_one_device_needs_no_group(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--model", "qwen3-30b-a3b", "--gpus", "1xh100")
    assert plan["choice"]["strategy"] == "replicated"
    assert plan["changes"] == []


def test_one_device_takes_experts_from_its_host(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--model", "qwen3-235b-a22b", "--gpus", "1xh100", "--host-memory", "500")
    assert plan["choice"]["strategy"] == "asyncep"
    assert plan["choice"]["memory"]["host"] > 380e9
    assert plan["choice"]["threshold_tokens"] > 50_000


def test_a_change_named_is_one_that_changes_the_choice() -> None:
    """At the link named the other strategy is ahead, a little on this side of it it is not."""
    model = Model.from_config("q", hardware.model_config("qwen3-235b-a22b"), "fp8")
    cluster = hardware.cluster("h100", 8)
    profile = Profile.of(model, read_workload("512,2048"))
    planner = Planner(model, cluster, profile, ExpertSkew())
    plan = planner.plan()
    assert plan.best.strategy == "asyncep"
    links = [change for change in plan.changes if change.quantity == "link" and change.at is not None]
    assert links
    for change in links:
        assert change.at is not None
        other = next(option for option in plan.options if option.strategy == change.strategy)
        for factor, wins in ((1.0, True), (1.05 if change.at < change.now else 1 / 1.05, False)):
            assert (planner._gap(plan.best, other, link=change.at * factor * 1e9) > 0) == wins
    assert {change.quantity for change in plan.changes} == {"link", "tokens under way"}


def test_kv_free_exactly_when_nothing_is_shared(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, *QWEN, "--workload", "1024")["kv_free"]
    assert not planned(capsys, *QWEN, "--workload", "few-shot")["kv_free"]


def test_tables_and_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert asyncep(["plan", *QWEN, "--workload", "long"]) == 0
    printed = capsys.readouterr().out
    for words in ("asyncep", "KV-free", "MFU", "t_EP", "to win", "tokens under way", "replicated cannot run"):
        assert words in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "gpt-5", "--gpus", "8xh100"], ["--model 'gpt-5'", "qwen3-30b-a3b"]),
        (["--model", "qwen3-30b-a3b", "--gpus", "h100"], ["--gpus 'h100'", "8xh100"]),
        (["--model", "qwen3-30b-a3b", "--gpus", "0xh100"], ["--gpus '0xh100'"]),
        (["--model", "qwen3-30b-a3b", "--gpus", "8xv100"], ["--gpus '8xv100'", "h200"]),
        ([*QWEN, "--link", "fast"], ["--link 'fast'", "nvlink4"]),
        ([*QWEN, "--link", "0GB/s"], ["--link '0GB/s'"]),
        ([*QWEN, "--between", "3 apples"], ["--between '3 apples'"]),
        ([*QWEN, "--host-link", "-1"], ["--host-link '-1'"]),
        ([*QWEN, "--host-memory", "-1"], ["--host-memory -1"]),
        ([*QWEN, "--gpus-per-node", "0"], ["--gpus-per-node 0"]),
        ([*QWEN, "--workload", "nothing"], ["--workload 'nothing'", "few-shot"]),
        ([*QWEN, "--workload", "synthetic-tiny"], ["--workload 'synthetic-tiny'", "ultra-long"]),
        ([*QWEN, "--workload", "0"], ["--workload '0'"]),
        ([*QWEN, "--batch-tokens", "0"], ["--batch-tokens 0"]),
        ([*QWEN, "--skew", "0.5"], ["--skew 0.5"]),
        ([*QWEN, "--calibration", "/none.json"], ["--calibration /none.json"]),
        (["--model", "qwen3-30b-a3b", "--gpus", "8xa100", "--dtype", "fp8"], ["--dtype fp8", "a100", "bf16"]),
    ],
)
def test_wrong_flags_are_named(capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]) -> None:
    if "--host-link" in flags:
        flags = [*flags[:-2], "--host-link=-1"]
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for word in words:
        assert word in printed.err
    assert "Traceback" not in printed.err


def test_what_fits_nowhere_is_said_with_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "deepseek-v3", "--gpus", "2xh100", "--host-memory", "0"]) == 1
    printed = capsys.readouterr().err
    assert "--gpus 2xh100" in printed
    assert "GB too much" in printed


def test_models_from_files(tmp_path: Path) -> None:
    config = tmp_path / "model" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(hardware.model_config("gpt-oss-120b")))
    assert read_model(str(config.parent), "bf16").experts == 128
    assert read_model(str(config), "fp8").itemsize == 1
    config.write_text('{"model_type": "mamba"}')
    with pytest.raises(InputError, match="mamba"):
        read_model(str(config), "bf16")
    config.write_text("[]")
    with pytest.raises(InputError, match="no configuration"):
        read_model(str(config), "bf16")


def test_links_in_words_and_numbers() -> None:
    assert read_link("--link", "nvlink4").bandwidth == 360e9
    assert read_link("--link", "360").bandwidth == 360e9
    assert read_link("--link", "0.76Gbit/s").bandwidth == pytest.approx(95e6)
    assert read_link("--link", "200 MB/s").bandwidth == 200e6


def test_clusters() -> None:
    cluster = read_cluster("16xh200", link="100GB/s", between="ib-hdr", host=None, per_node=4, host_gb=10)
    assert (cluster.devices, cluster.per_node, cluster.host_bytes) == (16, 4, 1e10)
    assert (cluster.inside.bandwidth, cluster.between.bandwidth) == (100e9, 22e9)


def test_workloads_from_files(tmp_path: Path) -> None:
    file = tmp_path / "w.jsonl"
    rows = [{"tokens": 300, "shared": 200, "group": "a"}, {"tokens": 500, "shared": 200, "group": "a"}, {"tokens": 64}]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    first, second, third = read_workload(str(file))
    assert first.token_ids[:200] == second.token_ids[:200]
    assert first.token_ids[200:300] != second.token_ids[200:300]
    assert (len(third.token_ids), third.group) == (64, -1)
    file.write_text('{"input_length": 600, "hash_ids": [1, 2], "timestamp": 0}\n')
    assert len(read_workload(str(file))[0].token_ids) == 600
    for bad in ('{"tokens": 5, "shared": 6}', '{"text": "x"}', "nonsense", "[1]"):
        file.write_text(bad)
        with pytest.raises(InputError, match=r"w\.jsonl:1"):
            read_workload(str(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"w\.jsonl"):
        read_workload(str(file))
    file.write_text("")
    with pytest.raises(InputError, match="no requests"):
        read_workload(str(file))


def test_a_profile_counts_shared_prefixes_once() -> None:
    model = Model.from_config("q", hardware.model_config("qwen3-30b-a3b"))
    prompts = read_workload("few-shot")
    profile = Profile.of(model, prompts)
    assert 0.8 < profile.cached_share < 0.95
    assert profile.batch(profile.work.tokens) == replace(profile.work)
    assert profile.batch(1000).flops == pytest.approx(profile.work.flops * 1000 / profile.work.tokens)


def test_planning_needs_neither_torch_nor_sglang() -> None:
    script = """
import sys
from asyncep.commands.plan import digits, main
assert main(["--model", "qwen3-30b-a3b", "--gpus", "2xh100", "--workload", "512"]) == 0
sys.exit(", ".join({"torch", "sglang"} & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


OWN = {
    "memory_bytes": 100e9,
    "memory_bandwidth": 2e12,
    "peak": {"bf16": 500e12},
    "gemm": {"bf16": {"top": 0.7, "half": 100}},
    "attention": {"top": 0.5, "half": 500},
    "inside": {"bandwidth": 200e9, "latency": 4e-6},
    "host": "pcie5",
    "host_bytes": 100e9,
}


def test_a_device_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "Mine.json"
    file.write_text(json.dumps(OWN))
    plan = planned(capsys, "--model", "qwen3-30b-a3b", "--gpus", f"4x{file}")
    assert (plan["gpus"], plan["device"]) == (4, "Mine")
    assert plan["choice"]["memory"]["total"] <= 100e9
    for missing in ("peak", "inside", "attention"):
        file.write_text(json.dumps({name: value for name, value in OWN.items() if name != missing}))
        assert main(["--model", "qwen3-30b-a3b", "--gpus", f"4x{file}"]) == 2
        assert f"{missing} missing" in capsys.readouterr().err
    for wrong in ({"inside": "carrier pigeon"}, {"peak": {"bf16": "much"}}, {"per_node": "many"}, {"memory_bytes": 0}):
        file.write_text(json.dumps({**OWN, **wrong}))
        assert main(["--model", "qwen3-30b-a3b", "--gpus", f"4x{file}"]) == 2
        assert "--gpus '4x" in capsys.readouterr().err
    file.write_text("[]")
    assert main(["--model", "qwen3-30b-a3b", "--gpus", f"4x{file}"]) == 2


@pytest.mark.parametrize("device", ["b200", "l40s", "mi300x"])
def test_more_devices(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--model", "qwen3-30b-a3b", "--gpus", f"8x{device}")
    assert 0.05 < plan["choice"]["mfu"] < 0.7


def test_hub_names_as_the_hubs_client_has_them(tmp_path: Path) -> None:
    """A model that the client has downloaded before, and one that it has not."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(hardware.model_config("qwen3-30b-a3b")))
    refs = tmp_path / "hub" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def run(model: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "asyncep", "plan", "--model", model, "--gpus", "1xh100", "--json"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    there = run("some/model")
    assert there.returncode == 0, there.stderr
    assert "--model-path some/model" in json.loads(there.stdout)["start"]["command"]
    gone = run("no/such-model")
    assert gone.returncode == 2
    assert "--model 'no/such-model': the hub has no config.json of that name, or cannot be reached" in gone.stderr


def test_how_to_start_it_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    start = planned(capsys, "--model", "qwen3-30b-a3b", "--gpus", "1xh100")["start"]
    _, said = start["command"].split("asyncep serve --model-path Qwen/Qwen3-30B-A3B --dp-size 1 ")
    assert said.startswith("--asyncep-strategy replicated --asyncep-threshold-tokens ")
    assert start["needs"] == ["nothing of asyncep serve has run on a GPU yet"]
    start = planned(capsys, "--model", "deepseek-v3", "--gpus", "16xh200", "--dtype", "fp8")["start"]
    assert [need.split(",")[0] for need in start["needs"]][:2] == [
        "DeepseekV3ForCausalLM is not among the served architectures: Qwen3MoeForCausalLM",
        "asyncep serve takes bf16 and fp32 experts",
    ]
    plan = planned(capsys, *QWEN, "--dtype", "fp8", "--workload", "512", "--link", "0.4GB/s", "--host-memory", "0")
    assert plan["start"]["command"].startswith("sglang serve --model-path Qwen/Qwen3-235B-A22B --pp-size")
    start = planned(capsys, "--model", "qwen3-147m", "--gpus", "1xcpu-core")["start"]
    assert start["needs"] == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "qwen3-30b-a3b", "--gpus", "1xh100"],
        ["--model", "qwen3-30b-a3b", "--gpus", "1xh100", "--workload", "512"],
        ["--model", "qwen3-147m", "--gpus", "1xcpu-core"],
        ["--model", "qwen3-235b-a22b", "--gpus", "1xh100", "--host-memory", "500"],
        [*QWEN, "--dtype", "fp8"],
    ],
)
def test_the_command_is_one_that_the_server_takes(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    """With the batch and the cache that were planned."""
    plan = planned(capsys, *flags)
    program, command, *given = plan["start"]["command"].split()
    assert (program, command) == ("asyncep", "serve")
    options = parse(given)
    choice = plan["choice"]
    assert options.run.strategy == choice["strategy"]
    assert options.run.kv_free == plan["kv_free"]
    if choice["strategy"] == "replicated":
        assert options.run.threshold_tokens == choice["batch_tokens"]


def test_no_device_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    start = planned(capsys, "--model", "qwen3-30b-a3b", "--gpus", "12xh200", "--host-memory", "0")["start"]
    size = int(start["command"].split("--dp-size ")[1].split()[0]) if "--dp-size" in start["command"] else 0
    assert size * start["servers"] == 12


def test_a_million_rows(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *QWEN, "--price", "2.5")
    million, rate = plan["million_rows"], plan["choice"]["requests_per_second"]
    assert million["seconds"] == pytest.approx(1e6 / rate)
    assert million["cost"] == pytest.approx(8 * 2.5 * 1e6 / rate / 3600)
    assert main([*QWEN, "--price", "-1"]) == 2
    assert "--price -1.0: must be at least 0" in capsys.readouterr().err
    assert main(QWEN) == 0
    printed = capsys.readouterr().out
    for words in ("a million rows: ", "device hours", "simulated, calibrated on nothing", "before that: ", "start: "):
        assert words in printed
    assert "at the price" not in printed


def test_no_number_on_the_page_has_more_than_three_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QWEN, "--dtype", "fp8", "--price", "2.5"]) == 0
    printed = capsys.readouterr().out.replace("qwen3-235b-a22b", "").replace("Qwen3-235B-A22B", "")
    printed = re.sub(r"start: .*", "", printed)
    for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", printed):
        plain = number.replace(",", "").rstrip(".")
        if "." in plain or int(plain or 0) % 1024:  # batches are powers of two
            assert len(plain.replace(".", "").strip("0")) <= 3, (number, printed)


def test_what_the_simulator_was_calibrated_on_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    file.write_text('{"machine": "h100"}')
    assert main([*QWEN, "--calibration", str(file)]) == 0
    assert f"simulated, calibrated on {file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (1234567.0, "1,230,000"), (5.4999, "5.50"), (0.012345, "0.0123"), (999.6, "1,000"), (math.inf, "inf")],
)
def test_three_digits(value: float, shown: str) -> None:
    assert digits(value) == shown
