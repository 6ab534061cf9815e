"""Two ranks, prompts one at a time: the idle rank computes a part of them, and the bits are those of one rank."""

from __future__ import annotations

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
def test_a_rank_that_goes_while_it_helps_costs_nothing_but_time(
    server: Server, alone: Server, how: signal.Signals
) -> None:
    wanted = prompts(60, seed=2)
    expected = one_by_one(alone, wanted)
    found: list[list[list[float]]] = []
    asking = threading.Thread(target=lambda: found.append(one_by_one(server, wanted)))
    asking.start()
    for number in range(2):
        time.sleep(0.5)
        psutil.Process(server.status()["ranks"][number]["pid"]).send_signal(how)
    asking.join(240)
    assert found == [expected]
    deadline = time.monotonic() + 120
    # A rank that has started anew counts from 0.
    last = helped(server)
    while True:
        assert time.monotonic() < deadline
        assert one_by_one(server, wanted[:10]) == expected[:10]
        before, last = last, helped(server)
        if last > before:
            break
