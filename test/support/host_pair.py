"""What tests of two emulated hosts ask of them, and how a server is started on one."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import server as servers
from server import Server
from two_hosts import Hosts

PORT = 30000
LABELS = [3, 40, 500]


def prompts(count: int, seed: int, longest: int = 200) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(3, 512) for _ in range(numbers.randrange(20, longest))] for _ in range(count)]


def one_by_one(server: Server, wanted: list[list[int]]) -> list[list[float]]:
    """Each prompt in a batch of its own, so that sums are taken in the same order everywhere."""
    return [server.log_probabilities([prompt], LABELS)[0] for prompt in wanted]


def start_on(
    hosts: Hosts, host: int, model: Path, log: Path, *flags: str, port: int = PORT, patience: int = 6
) -> Server:
    """A server of two ranks, one of a group of two; not waited for."""
    command = [sys.executable, "-m", "asyncep", "serve", "--model-path", str(model), "--dp-size", "2"]
    command += ["--nnodes", "2", "--node-rank", str(host), "--dist-init-addr", hosts.rendezvous]
    command += ["--asyncep-patience-secs", str(patience)]
    command += ["--host", "0.0.0.0", "--port", str(port), "--device", "cpu", *flags]
    return servers.run(hosts.command(host, command), hosts.url(host, port), log)
