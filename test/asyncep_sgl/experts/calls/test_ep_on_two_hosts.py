"""`--asyncep-strategy ep` on two emulated hosts, two ranks each: one host's bits, whatever happens to the workers."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from host_pair import Pair, calls, metric, one_by_one, pair_of_servers, prompts, worker
from server import Server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def alone(tiny_model: Callable[[str], Path], serve: Callable[..., Server]) -> Server:
    return serve(tiny_model("qwen3_moe"), "--device", "cpu", ranks=1)


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[[str], Path], alone: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair_of_servers(tiny_model("qwen3_moe"), alone, tmp_path_factory, "--asyncep-strategy", "ep") as found:
        yield found


def test_answers_are_bit_for_bit_those_of_one_host(pair: Pair) -> None:
    wanted = prompts(12, seed=1)
    expected = one_by_one(pair.alone, wanted)
    assert one_by_one(pair.one, wanted) == expected
    assert one_by_one(pair.other, wanted) == expected
    for server in (pair.one, pair.other):
        found = calls(server)
        assert found["layers"] == 2 * 2  # of three layers the first is kept by both
        assert found["sent"] > 0
        assert found["fetched_rows"] == 0, server.log.read_text()
        assert metric(server, "asyncep_calls_sent_total") == found["sent"]
        assert metric(server, "asyncep_served_rows_total") > 0
    assert pair.one.status()["gathers"] == []


def test_both_hosts_at_once(pair: Pair) -> None:
    """Each computes its own requests and the other's rows."""
    wanted = prompts(30, seed=2)
    expected = one_by_one(pair.alone, wanted)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(one_by_one, (pair.one, pair.other), (wanted, wanted)))
    assert found == [expected, expected]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_a_worker_that_goes_costs_nothing_but_time(pair: Pair, how: signal.Signals) -> None:
    """Killed it is started again; stopped, it is told to go on. Meanwhile its experts are fetched."""
    wanted = prompts(40, seed=3)
    expected = one_by_one(pair.alone, wanted)
    gone = worker(pair.other)
    fetched = calls(pair.one)["fetched_rows"]
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(one_by_one(pair.one, wanted)))
    asking.start()
    gone.send_signal(how)
    asking.join(240)
    assert found == [expected]
    deadline = time.monotonic() + 60
    while metric(pair.one, "asyncep_calls_fetched_rows_total") <= fetched:
        assert time.monotonic() < deadline
        one_by_one(pair.one, wanted[:1])
    # It is asked again once it is back.
    while True:
        before = calls(pair.one)
        assert one_by_one(pair.one, wanted[:5]) == expected[:5]
        time.sleep(1.1)
        one_by_one(pair.one, wanted[:1])
        after = calls(pair.one)
        if after["sent"] > before["sent"] and after["fetched_rows"] == before["fetched_rows"]:
            break
        assert time.monotonic() < deadline, pair.one.log.read_text()[-3000:]
    if how == signal.SIGKILL:
        assert worker(pair.other).pid != gone.pid


def test_the_link_is_out_for_a_while(pair: Pair) -> None:
    wanted = prompts(6, seed=4)
    expected = one_by_one(pair.alone, wanted)
    pair.hosts.link(up=False)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(one_by_one, pair.one, wanted)
        time.sleep(2)
        assert not answer.done()
        pair.hosts.link(up=True)
        assert answer.result(120) == expected


def test_what_runs_beside_the_front(pair: Pair) -> None:
    """An exporter and a worker, and nothing else."""
    for server in (pair.one, pair.other):
        beside = {
            part.rpartition(".")[2]
            for child in psutil.Process(server.process.pid).children()
            for part in child.cmdline()
            if part.startswith("asyncep_sgl.experts.")
        }
        assert beside == {"exporter", "worker"}
