"""Ranks that die, stop or do not answer, on a real server: who is answered with what, and how soon all is well."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from ranks_under_load import Load, ask, in_flight, prompt, rank_pids, router, wait_until
from server import Server

pytestmark = pytest.mark.server

PARALLEL = 32


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], tiny_model: Callable[[str], Path]) -> Server:
    return serve(tiny_model("qwen3_moe"), "--dtype", "float32")


@pytest.fixture(scope="module")
def lone(serve: Callable[..., Server], tiny_model: Callable[[str], Path]) -> Server:
    grace = ("--shutdown-grace-period-secs", "90")
    return serve(tiny_model("qwen3_moe"), "--dtype", "float32", *grace, ranks=1)


def test_ten_deaths_under_load_cost_nothing_but_moments(server: Server) -> None:
    before = router(server)["restarts"][1]
    processes = len(server.processes())
    comebacks = []
    with Load(server) as load:
        for number in range(1, 11):
            os.kill(rank_pids(server)[1], signal.SIGKILL)
            comebacks.append(wait_until(lambda n=number: router(server)["restarts"][1] == before + n))  # type: ignore[misc]
            done = len(load.statuses)
            wait_until(lambda d=done: len(load.statuses) > d + 8)  # type: ignore[misc]
    assert set(load.statuses) == {200}
    assert router(server)["quarantined"] == 0
    # Each is forked: the ones after the first take no longer than it, give or take what the machine does.
    assert max(comebacks[1:]) < 3 * comebacks[0] + 3, comebacks
    # Nothing is left of those that died, zombies included.
    wait_until(lambda: len(server.processes()) <= processes)


def test_a_rank_that_dies_while_it_starts_comes_back_all_the_same(server: Server) -> None:
    before = router(server)["restarts"][1]
    known = {process.pid for process in server.processes()}
    os.kill(rank_pids(server)[1], signal.SIGKILL)
    starting: list[psutil.Process] = []

    def found() -> bool:
        starting[:] = [process for process in server.processes() if process.pid not in known]
        return bool(starting)

    wait_until(found)
    starting[0].kill()
    wait_until(lambda: router(server)["restarts"][1] > before)
    assert ask(server, prompt(1), routed_dp_rank=1).status_code == 200


def test_questions_and_health_while_a_rank_is_away(server: Server) -> None:
    for question in ("/server_info", "/flush_cache", "/health", "/v1/loads"):
        before = router(server)["restarts"][1]
        os.kill(rank_pids(server)[1], signal.SIGKILL)
        began = time.monotonic()
        answer = httpx.get(server.url + question, timeout=60)
        assert time.monotonic() - began < 15
        assert answer.status_code in ((200,) if question != "/flush_cache" else (200, 400, 503)), answer.text
        wait_until(lambda b=before: router(server)["restarts"][1] > b)  # type: ignore[misc]
    assert len(httpx.get(server.url + "/server_info", timeout=60).json()["internal_states"]) == 2
    wait_until(lambda: server.post("/flush_cache", {}).status_code == 200, 30)


def test_questions_while_a_rank_stands_still(server: Server) -> None:
    pid = rank_pids(server)[1]
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: httpx.get(server.url + "/server_info", timeout=60), range(12)))
        assert {answer.status_code for answer in answers} == {200}
        # Those that ask at once share the wait.
        assert time.monotonic() - began < 15
        assert httpx.get(server.url + "/health", timeout=60).status_code == 200
    finally:
        os.kill(pid, signal.SIGCONT)
    # The late answers to the old questions are not taken for those to the new one.
    assert len(httpx.get(server.url + "/server_info", timeout=60).json()["internal_states"]) == 2
    wait_until(lambda: server.post("/flush_cache", {}).status_code == 200, 30)


def test_a_rank_that_is_stopped_under_load_is_replaced(server: Server) -> None:
    before = router(server)["restarts"][1]
    pid = rank_pids(server)[1]
    with Load(server) as load:
        wait_until(lambda: len(load.statuses) > 20)
        os.kill(pid, signal.SIGSTOP)
        seconds = wait_until(lambda: router(server)["restarts"][1] > before)
    assert set(load.statuses) == {200}
    assert seconds < 60
    assert pid not in rank_pids(server)
    assert router(server)["quarantined"] == 0


def test_a_router_that_was_stopped_blames_nobody(server: Server) -> None:
    before, pids = router(server)["restarts"], rank_pids(server)
    controller = next(p for p in server.processes() if "controller" in " ".join(p.cmdline()))
    controller.suspend()
    # Longer than a rank may be silent: what is measured is real time that passes.
    threading.Event().wait(14)
    controller.resume()
    assert ask(server, prompt(5)).status_code == 200
    threading.Event().wait(3)
    assert (router(server)["restarts"], rank_pids(server)) == (before, pids)


def test_health_of_a_server_without_a_rank_says_so(lone: Server) -> None:
    assert httpx.get(lone.url + "/health", timeout=30).json()["ranks"] == 1
    before = router(lone)["restarts"][0]
    os.kill(rank_pids(lone)[0], signal.SIGKILL)
    seen: list[httpx.Response] = []

    def back() -> bool:
        began = time.monotonic()
        seen.append(httpx.get(lone.url + "/health_generate", timeout=30))
        assert time.monotonic() - began < 10
        return bool(router(lone)["restarts"][0] > before)

    wait_until(back)
    assert {answer.status_code for answer in seen} <= {200, 503}
    away = [answer for answer in seen if answer.status_code == 503]
    assert away
    assert "no rank serves" in away[0].text
    assert httpx.get(lone.url + "/health", timeout=30).status_code == 200


def test_a_stop_keeps_its_grace_while_the_rank_is_away(lone: Server) -> None:
    pid = rank_pids(lone)[0]
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(PARALLEL) as pool:
        answers = [pool.submit(ask, lone, prompt(i)) for i in range(PARALLEL)]
        wait_until(lambda: in_flight(lone, 0) + router(lone)["pending"] >= PARALLEL)
        lone.process.send_signal(signal.SIGTERM)
        os.kill(pid, signal.SIGKILL)
        assert [answer.result().status_code for answer in answers] == [200] * PARALLEL
    assert lone.process.wait(30) == 0
