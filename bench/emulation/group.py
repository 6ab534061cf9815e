"""A running group: one server on each of two emulated hosts, and what their ranks say of each batch's gathers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from emulation.two_hosts import Hosts
from peer_start import ADMIN_KEY
from stock_end import end_with_parent

from asyncep_sgl.process.key_memory import ADMIN_KEY_VARIABLE

PORT = 30000
START_SECONDS = 300


@dataclass
class GroupServer:
    """One host's server. ``batches`` reads what has been logged since it was last asked."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    _read: int = 0
    # The server closes a connection that has been idle for five seconds; one that is older is not used again.
    client: httpx.Client = field(
        default_factory=lambda: httpx.Client(timeout=600, limits=httpx.Limits(keepalive_expiry=2))
    )

    def ready(self) -> None:
        """Returns once clients may come: the experts are there and T has been measured.

        Raises:
            RuntimeError: it ended, or takes too long; with the end of what it printed.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if " ready in " in self.log.read_text():
                return
            time.sleep(0.5)
        raise RuntimeError(f"no server at {self.url}:\n{self.log.read_text()[-3000:]}")

    def ask(self, prompt: list[int], labels: Sequence[int] = (3, 4, 5)) -> list[float]:
        """Log-probabilities of ``labels`` after ``prompt``."""
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "token_ids_logprob": list(labels),
        }
        response = self.client.post(f"{self.url}/generate", json=body)
        response.raise_for_status()
        return [entry[0] for entry in response.json()["meta_info"]["output_token_ids_logprobs"][0]]

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"{self.url}/asyncep/status").json()
        return found

    def batches(self) -> list[dict[str, Any]]:
        with self.log.open() as file:
            file.seek(self._read)
            text = file.read()
            # A line that is still being written is for the next time.
            whole = text.rfind("\n") + 1
            self._read += len(text[:whole].encode())
        lines = (line[line.index("{") :] for line in text[:whole].splitlines() if '"event": "gather"' in line)
        return [json.loads(line) for line in lines]

    def scheduler(self) -> psutil.Process:
        """The (first) rank's process."""
        return psutil.Process(self.status()["ranks"][0]["pid"])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.process.kill()
        self.process.wait()
        self.client.close()


@contextlib.contextmanager
def group(
    hosts: Hosts, model: Path, *flags: str, divided: bool = True, environment: Mapping[str, str] | None = None
) -> Iterator[list[GroupServer]]:
    """Both hosts' servers, one rank and one core each, ready.

    Args:
        flags: of both; the strategy is ``asyncep`` unless they name another.
        divided: the hosts share one set of experts; False: each has all of them and knows of no other host.
        environment: more variables.
    """
    started: list[GroupServer] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for node in (0, 1):
                log = Path(folder) / f"{node}.txt"
                command = [sys.executable, "-m", "asyncep", "serve", "--model-path", str(model), "--device", "cpu"]
                command += ["--host", "0.0.0.0", "--port", str(PORT), "--skip-tokenizer-init"]
                # The rank is told apart by it where a router stands in front.
                command += ["--weight-version", f"rank {node}"]
                if divided:
                    command += ["--nnodes", "2", "--node-rank", str(node), "--dist-init-addr", hosts.rendezvous]
                    if "--asyncep-strategy" not in flags:
                        command += ["--asyncep-strategy", "asyncep"]
                    if "ep" not in flags:  # it gathers nothing
                        command += ["--asyncep-log-gathers"]
                with log.open("wb") as output:
                    process = subprocess.Popen(
                        hosts.command(node, [*command, *flags]),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, ADMIN_KEY_VARIABLE: ADMIN_KEY, **(environment or {})},
                        preexec_fn=end_with_parent,
                    )
                started.append(GroupServer(hosts.url(node, PORT), process, log))
            for server in started:
                server.ready()
                server.batches()
            yield started
        finally:
            for server in started:
                server.stop()


def random_prompt(numbers: random.Random, tokens: int, vocabulary: int) -> list[int]:
    return [numbers.randrange(3, vocabulary) for _ in range(tokens)]
