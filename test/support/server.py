"""Starts real servers for tests and makes sure that nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from asyncep_sgl.process.ports import free_port

START_SECONDS = 300
STOP_SECONDS = 30


@dataclass
class Server:
    """A running server and what it printed.

    Attributes:
        process: the launcher.
        url: where it answers.
        log: file that takes what it and its children print.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def post(self, path: str, body: Any, timeout: float = 120) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=timeout)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(self.url + "/asyncep/status", timeout=30).json()
        return found

    def log_probabilities(self, prompts: list[list[int]], labels: list[int], **fields: Any) -> list[list[float]]:
        """Log-probability of each of ``labels`` after each prompt."""
        body = {
            "input_ids": prompts,
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "token_ids_logprob": labels,
            **fields,
        }
        response = self.post("/generate", body)
        response.raise_for_status()
        answers = response.json()
        return [[entry[0] for entry in a["meta_info"]["output_token_ids_logprobs"][0]] for a in answers]

    def processes(self) -> list[psutil.Process]:
        """Everything the launcher has started, itself first."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Signals the launcher and waits for its end; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(STOP_SECONDS)


def start(
    command: Sequence[str],
    port: int,
    log: Path,
    environment: dict[str, str] | None = None,
) -> Server:
    """Runs Python with ``command`` and returns once it answers on ``port``.

    Raises:
        RuntimeError: it ended first or takes too long; carries the end of what it printed.
    """
    server = run([sys.executable, *command], f"http://127.0.0.1:{port}", log, environment)
    wait_ready(server)
    return server


def run(command: Sequence[str], url: str, log: Path, environment: dict[str, str] | None = None) -> Server:
    """Starts a server that will answer at ``url`` and returns at once."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    return Server(process, url, log)


def wait_ready(server: Server) -> None:
    """Returns once ``server`` answers.

    Raises:
        RuntimeError: it ended first or takes too long; carries the end of what it printed.
    """
    process, log = server.process, server.log
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(server.url + "/health", timeout=10).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        # Polling another process over HTTP: there is nothing to wait on.
        time.sleep(0.2)
    server.process.kill()
    raise RuntimeError(f"no server at {server.url} (status {process.poll()}):\n{log.read_text()[-4000:]}")


def wait_measured(server: Server) -> None:
    """Returns once ``server`` answers and has measured its T; only then are its ranks started again if they die.

    Before, T is what the peak says.
    """
    wait_ready(server)
    deadline = time.monotonic() + START_SECONDS
    while " ready in " not in server.log.read_text():
        assert time.monotonic() < deadline, server.log.read_text()[-2000:]
        time.sleep(0.2)


def start_asyncep(model: Path, log: Path, *arguments: str, ranks: int = 2) -> Server:
    """``asyncep serve`` on a free port."""
    port = free_port()
    command = [
        "-m",
        "asyncep",
        "serve",
        "--model-path",
        str(model),
        "--port",
        str(port),
        "--dp-size",
        str(ranks),
    ]
    return start([*command, *arguments], port, log)


def start_stock(model: Path, log: Path, *arguments: str) -> Server:
    """Stock SGLang with one rank on the plain-CPU platform."""
    port = free_port()
    command = [
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(model),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    flags = "--attention-backend torch_native --disable-overlap-schedule --sleep-on-idle --skip-server-warmup"
    return start(
        [*command, *flags.split(), "--max-total-tokens", "65536", *arguments],
        port,
        log,
        {"OMP_NUM_THREADS": "1"},
    )
