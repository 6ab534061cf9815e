"""Weights and tokens mixed on two emulated hosts, two ranks each: one host's bits, whatever is chosen or killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from host_pair import calls, metric, one_by_one, pair_of_servers, prompts, side_process, worker
from server import Server

pytestmark = pytest.mark.server


def again(server: Server, wanted: list[list[int]], killed: threading.Event, rounds: int) -> list[Any]:
    """The same prompts again and again, ``rounds`` times after something was killed; the answers of those."""
    while not killed.is_set():
        one_by_one(server, wanted)
    return [one_by_one(server, wanted) for _ in range(rounds)]


@pytest.mark.parametrize("strategy", ["auto", "random:1"])
def test_whatever_is_fetched_and_sent_the_bits_are_the_same(
    tiny_model: Callable[[str], Path],
    serve: Callable[..., Server],
    tmp_path_factory: pytest.TempPathFactory,
    strategy: str,
) -> None:
    """Chosen by cost or drawn, on both hosts at once, while one host's worker and exporter are killed."""
    model = tiny_model("qwen3_moe")
    alone = serve(model, "--device", "cpu", ranks=1)
    wanted, killed = prompts(20, seed=5), threading.Event()
    expected = one_by_one(alone, wanted)
    with pair_of_servers(model, alone, tmp_path_factory, "--asyncep-strategy", strategy) as pair:
        before = [calls(server)["rows"] for server in (pair.one, pair.other)]
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(again, server, wanted, killed, 3) for server in (pair.one, pair.other)]
            worker(pair.other).kill()
            side_process(pair.one, "group.exporter").kill()
            killed.set()
            assert [one.result(300) for one in found] == [[expected] * 3, [expected] * 3]
        for server, rows in zip((pair.one, pair.other), before, strict=True):
            time.sleep(1.1)  # ranks tell the launcher at most once a second
            one_by_one(server, wanted[:4])
            if strategy == "random:1":  # to the tiny model's experts it is as cheap to fetch all
                assert calls(server)["rows"] > rows
            assert server.status()["gathers"][0]["layers"] == 2
            assert not server.status()["waits_for_weights"]
        if strategy == "random:1":
            assert metric(pair.one, "asyncep_calls_fetched_rows_total") > 0
            assert metric(pair.one, "asyncep_gather_batches_total") > 0
