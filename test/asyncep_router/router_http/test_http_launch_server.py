"""Servers and router started by one command, with null workers in the place of servers."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from asyncep_sgl.process.ports import free_port
from router_http.harness import HERE, wait_for

_PROGRAM = """
import sys
from asyncep_router import launch_server
launch_server._COMMANDS["asyncep"] = (sys.argv.pop(1),)
sys.exit(launch_server.main())
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_everything_started_is_stopped(end: signal.Signals, tmp_path: Path) -> None:
    port, base = free_port(), free_port()
    arguments = (
        f"--model-path /nowhere --port {port} --router-dp-worker-base-port {base} --router-workers 1 --dp-size 2"
    )
    command = [sys.executable, "-c", _PROGRAM, str(HERE / "null_worker.py"), *arguments.split()]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--router-prometheus-port", "0"], stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    try:

        def ready() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                return httpx.get(f"http://127.0.0.1:{port}/readiness").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(ready, "ready")
        answer = httpx.post(f"http://127.0.0.1:{port}/generate", json={"input_ids": [[1, 2], [3]]})
        assert [entry["meta_info"]["sum"] for entry in answer.json()] == [3, 3]
        (server,) = psutil.Process(process.pid).children()
        process.send_signal(end)
        assert process.wait(30) == 0
        assert not server.is_running()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()
