"""Requests that kill the rank that computes them, on a real server: nobody else is hurt, and the server goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from ranks_under_load import NOTHING_NEW, Load, ask, prompt, router, wait_until
from server import Server

pytestmark = pytest.mark.server

# What `deadly/sitecustomize.py` kills its rank for: when it is taken, and in the pass over it.
BEFORE = [11, 13, 17, 19, 23]
FORWARD = [11, 13, 17, 19, 29]


@pytest.fixture(scope="module", params=[1, 2])
def server(
    request: pytest.FixtureRequest, serve: Callable[..., Server], tiny_model: Callable[[str], Path]
) -> Iterator[Server]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent / "deadly")
    try:
        started = serve(tiny_model("qwen3_moe"), "--dtype", "float32", ranks=request.param)
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    yield started
    started.stop()


def deaths(server: Server) -> int:
    wait_until(lambda: all(router(server)["alive"]))
    return sum(router(server)["restarts"])


@pytest.mark.parametrize("deadly", [BEFORE, FORWARD], ids=["before the pass", "in the pass"])
def test_a_deadly_request_costs_two_deaths_and_nobody_s_answer(deadly: list[int], server: Server) -> None:
    before = deaths(server)
    with ThreadPoolExecutor(8) as pool, Load(server, 6) as load:
        wait_until(lambda: len(load.statuses) > 12)
        # In the middle of a list of one client: the others of the list are answered too.
        answers = [pool.submit(ask, server, tokens) for tokens in (prompt(1), [*deadly, 5], prompt(2))]
        statuses = [answer.result().status_code for answer in answers]
    assert statuses == [200, 500, 200]
    assert "was on a rank both times it died; quarantined" in answers[1].result().text
    assert set(load.statuses) == {200}
    assert deaths(server) == before + 2
    # Under another id it is refused, and no rank sees it.
    for number in range(20):
        again = ask(server, [*deadly, 5], rid=f"again-{number}-{deadly}")
        assert again.status_code == 500
        assert "quarantined" in again.text
    assert deaths(server) == before + 2
    # Its last tokens or its settings make it another, which has to be found out for itself.
    assert ask(server, [*deadly[:4], 5]).status_code == 200


def test_many_deadly_requests_at_once_do_not_end_the_server(server: Server) -> None:
    before = deaths(server)
    kinds = [[*(BEFORE if number % 2 else FORWARD), 100 + number] for number in range(8)]
    with ThreadPoolExecutor(16) as pool, Load(server, 4) as load:
        answers = list(pool.map(lambda tokens: ask(server, tokens), [*kinds, *kinds]))
    assert {answer.status_code for answer in answers} == {500}
    assert all("quarantined" in answer.text for answer in answers)
    assert set(load.statuses) == {200}
    assert deaths(server) <= before + 2 * len(kinds)
    assert ask(server, prompt(3)).status_code == 200


def test_a_client_that_hangs_up_does_not_hide_what_it_sent(server: Server) -> None:
    before = router(server)["quarantined"]
    body = {"input_ids": [*FORWARD, 77], "sampling_params": NOTHING_NEW}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(server.url + "/generate", json=body, timeout=0.15)
    wait_until(lambda: router(server)["quarantined"] > before)
    assert ask(server, [*FORWARD, 77]).status_code == 500
    assert ask(server, prompt(4)).status_code == 200
