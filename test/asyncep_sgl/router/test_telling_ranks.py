"""The router never waits for a rank to take a message: one may die between any two instructions."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import zmq
from sglang.srt.managers.io_struct import AbortReq, sock_recv

from asyncep_sgl.router import controller, rank_life
from asyncep_sgl.router.rank_life import RankLife


@pytest.mark.timeout(20)
def test_a_rank_that_is_gone_is_told_nothing_and_nobody_waits(tmp_path: Path) -> None:
    life: Any = object.__new__(RankLife)
    with zmq.Context() as context, context.socket(zmq.PUSH) as line:
        line.linger = 0
        address = f"ipc://{tmp_path}/rank"
        line.bind(address)
        life.workers = [line]
        assert not life._tell(0, AbortReq(rid="early"))
        with context.socket(zmq.PULL) as rank:
            rank.connect(address)
            line.poll(10_000, zmq.POLLOUT)
            assert life._tell(0, AbortReq(rid="heard"))
            assert sock_recv(rank).rid == "heard"
        while life._tell(0, AbortReq(rid="late")):
            pass  # until the socket has noticed
        assert not life._tell(0, AbortReq(rid="lost"))


@pytest.mark.parametrize("module", [controller, rank_life])
def test_ranks_are_told_in_one_place(module: Any) -> None:
    lines = [line.strip() for line in inspect.getsource(module).splitlines() if "workers[" in line]
    assert lines == (["sock_send(self.workers[rank], message, zmq.NOBLOCK)"] if module is rank_life else [])
