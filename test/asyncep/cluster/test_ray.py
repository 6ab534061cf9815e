"""`asyncep classify --ray-address` on a Ray cluster of this host: two nodes with a server each, one of them killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from asyncep.cli import main

pytestmark = pytest.mark.server

ROWS = 3000


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    # The driver's own node takes no actor; its processes are ended with the two others.
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield found
    found.shutdown()


def servers(model: Path) -> list[psutil.Process]:
    """Launchers that this test's nodes have started."""
    commands = [(process, process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [process for process, command in commands if "asyncep.leashed" in command and str(model) in command]


def test_a_node_that_is_killed_costs_no_row(cluster: Any, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    rows = [{"text": f"this is row {i % (ROWS - 50)} of a job on two hosts", "label": "b"} for i in range(ROWS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    model = tiny_model("qwen3_moe")
    command = [sys.executable, "-m", "asyncep", "classify", str(tmp_path / "in.jsonl"), str(out), "--labels", "b,c"]
    command += ["--model-path", str(model), "--ray-address", cluster.address]
    command += ["--part-rows", "400", "--gold-field", "label"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        folder = tmp_path / "out.jsonl.job"
        # Looking into another process' folder: there is nothing to wait on.
        while process.poll() is None and len(list(folder.glob("part-*[0-9]"))) < 2:
            time.sleep(0.05)
        started = servers(model)
        assert len(started) == 2
        cluster.remove_node(nodes[1], allow_graceful=False)
        printed, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in found] == list(range(ROWS))
    assert all("label" in row for row in found)
    assert "is lost" in errors
    figures = json.loads(printed.splitlines()[-1])
    assert (figures["rows"], figures["errors"]) == (ROWS, 0)
    # Nothing is left of either: the killed node's server has ended with it.
    assert not psutil.wait_procs(started, timeout=60)[1]


def test_what_cannot_be_done_names_the_flag(cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    base = ["classify", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--labels", "b,c"]
    for arguments, words in (
        (["--url", "http://x", "--ray-address", "auto"], "give --model-path in place of --url"),
        (["--model-path", "m", "--ray-nodes", "2"], "--ray-nodes: only with --ray-address"),
        (["--model-path", "m", "--ray-address", cluster.address, "--ray-nodes", "9"], "--ray-nodes 9: the cluster has"),
        (["--model-path", "m", "--ray-address", "ray://x:1"], "run the command on a host of the cluster"),
    ):
        assert main([*base, *arguments]) == 2
        assert words in capsys.readouterr().err
