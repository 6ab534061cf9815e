"""What tests of two emulated hosts ask of them, and how a server is started on one."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
import server as servers
from server import Server
from two_hosts import Hosts, NoNamespacesError, two_hosts

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


class Pair(NamedTuple):
    """Two hosts' servers, and one that has everything."""

    hosts: Hosts
    one: Server
    other: Server
    alone: Server


@contextlib.contextmanager
def pair_of_servers(model: Path, alone: Server, logs: pytest.TempPathFactory, *flags: str) -> Iterator[Pair]:
    """Both hosts' servers, ready; a test that cannot have hosts is skipped."""
    started: list[Server] = []
    try:
        with two_hosts("100mbit") as hosts:
            for host in (1, 0):
                started.append(start_on(hosts, host, model, logs.mktemp("host") / "log.txt", *flags))
            for server in started:
                servers.wait_ready(server)
            yield Pair(hosts, started[1], started[0], alone)
    except NoNamespacesError as error:
        pytest.skip(str(error))
    finally:
        for server in started:
            server.stop(signal.SIGKILL)


def calls(server: Server) -> dict[str, float]:
    """What its ranks have said of their calls, added up."""
    reports = server.status()["calls"]
    return {name: sum(report[name] for report in reports) for name in reports[0] if name not in ("rank", "type")}


def side_process(server: Server, module: str) -> psutil.Process:
    launcher = psutil.Process(server.process.pid)
    return next(p for p in launcher.children(recursive=True) if f"asyncep_sgl.experts.{module}" in p.cmdline())


def worker(server: Server) -> psutil.Process:
    return side_process(server, "calls.worker")


def metric(server: Server, name: str) -> float:
    text = httpx.get(server.url + "/metrics", timeout=30).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))
