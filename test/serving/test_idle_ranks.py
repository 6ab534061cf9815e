"""Two ranks, prompts one at a time: the idle rank computes a part of them, and the bits are those of one rank."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from host_pair import metric, one_by_one
from server import Server

from asyncep_kernels.moe import cpu_native

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(cpu_native.library() is None, reason="no C kernels for this CPU"),
]
FLAGS = ("--device", "cpu", "--dtype", "bfloat16")


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], tiny_model: Callable[[str], Path]) -> Server:
    return serve(tiny_model("qwen3_moe"), *FLAGS)


@pytest.fixture(scope="module")
def alone(serve: Callable[..., Server], tiny_model: Callable[[str], Path]) -> Server:
    return serve(tiny_model("qwen3_moe"), *FLAGS, ranks=1)


def prompts(count: int, seed: int) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(3, 512) for _ in range(numbers.choice((1, 7, 300, 1500)))] for _ in range(count)]


def helped(server: Server) -> int:
    """Blocks that idle ranks have computed."""
    time.sleep(1.1)
    # Ranks report with a batch, once a second.
    one_by_one(server, [[3, 4, 5]] * 4)
    reports = server.status()["help"]
    assert [report["rank"] for report in reports] == [0, 1]
    assert all(report["helped"] <= report["blocks"] for report in reports)
    return sum(report["helped"] for report in reports)


def test_bits_are_those_of_one_rank(server: Server, alone: Server) -> None:
    wanted = prompts(40, seed=1)
    assert one_by_one(server, wanted) == one_by_one(alone, wanted)
    assert helped(server) > 0
    assert metric(server, 'asyncep_help_offered_blocks_total{rank="0"}') > 0
    # It is the other rank that helps: one alone has nobody.
    assert alone.status()["help"] == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_ranks_go_while_prompts_come_one_by_one(server: Server, alone: Server, how: signal.Signals) -> None:
    """Nothing is lost, the bits stay, and those who come in their place help again."""
    wanted = prompts(60, seed=int(how))
    expected = one_by_one(alone, wanted)
    before, restarts = pids(server), restarted(server)
    found: list[list[list[float]]] = []
    asking = threading.Thread(target=lambda: found.append(one_by_one(server, wanted)))
    asking.start()
    for rank in range(2):
        time.sleep(0.5)
        psutil.Process(before[rank]).send_signal(how)
    asking.join(240)
    assert found == [expected]
    deadline = time.monotonic() + 120
    while any(now == then for now, then in zip(restarted(server), restarts, strict=True)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    # A rank that has started anew counts from 0.
    last = helped(server)
    for round_number in itertools.count():
        assert time.monotonic() < deadline
        # What is in a prefix cache already is too little work to be offered.
        fresh = prompts(10, seed=1000 * how + round_number)
        assert one_by_one(server, fresh) == one_by_one(alone, fresh)
        seen, last = last, helped(server)
        if last > seen:
            break


def restarted(server: Server) -> list[int]:
    """How often each rank has come back, with its experts."""
    return [rank["restarts"] for rank in server.status()["ranks"]]


def pids(server: Server) -> list[int]:
    """Of the ranks' processes."""
    return [rank["pid"] for rank in server.status()["ranks"]]
