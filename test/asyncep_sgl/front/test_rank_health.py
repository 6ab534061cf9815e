"""``/health`` from what the router knows: soon, whatever the ranks do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from asyncep_sgl.front.questions import RankThere
from asyncep_sgl.front.rank_health import RankHealth

WELL = {"serving": [[0, 0], [1, 3]], "starting": [], "silent_seconds": {"0": 0.4, "1": 1.26}}


@contextmanager
def router(address: str, says: dict[str, Any], times: int) -> Iterator[None]:
    """Answers so many questions."""

    def serve() -> None:
        with zmq.Context() as context, context.socket(zmq.REP) as line:
            line.linger = 1000
            line.bind(address)
            for _ in range(times):
                assert line.recv() == b"health"
                line.send(json.dumps(says).encode())

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/state"


def test_a_server_with_a_rank_is_well(address: str) -> None:
    with router(address, WELL, 2):
        health = RankHealth(address, lambda: None)
        assert health.verdict() == (200, {"ranks": 2, "silent_seconds": 1.3})
        assert health.ranks_there() == {RankThere(0, 0), RankThere(1, 3)}


def test_a_server_without_one_says_which_are_coming(address: str) -> None:
    with router(address, {"serving": [], "starting": [0, 1], "silent_seconds": {}}, 1):
        status, body = RankHealth(address, lambda: None).verdict()
    assert status == 503
    assert body["error"]["message"] == "no rank serves; being started again: 0, 1"


def test_a_front_that_takes_nothing_is_not_asked_further(address: str) -> None:
    assert RankHealth(address, lambda: "the server is stopping").verdict()[0] == 503


def test_a_router_that_is_late_once_is_believed_and_one_that_is_gone_is_not(address: str) -> None:
    now = [100.0]
    health = RankHealth(address, lambda: None, lambda: now[0])
    with router(address, WELL, 1):
        assert health.verdict()[0] == 200
    now[0] += 5
    assert health.verdict()[0] == 200
    now[0] += 10
    assert health.verdict() == (
        503,
        {"error": {"message": "the router inside the server does not answer", "code": 503}},
    )
    assert health.ranks_there() is None
