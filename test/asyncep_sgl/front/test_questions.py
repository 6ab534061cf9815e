"""Questions to all ranks, with SGLang's own communicator and messages: never without end, never another's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import fastapi
import pytest
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import (
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    ProfileReq,
)

from asyncep_sgl.front import questions
from asyncep_sgl.front.questions import RankThere, call, handle_recv


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(questions, "READING_SECONDS", 0.4)
    monkeypatch.setattr(questions, "CHANGING_SECONDS", 0.6)
    monkeypatch.setattr(questions, "PROFILING_SECONDS", 0.6)
    monkeypatch.setattr(questions, "_LOOK_SECONDS", 0.05)
    yield
    questions._ranks_there.clear()


class Ranks:
    """Ranks that answer what they are asked when the test says so."""

    def __init__(self, count: int) -> None:
        self.there: set[RankThere] | None = {RankThere(rank, 0) for rank in range(count)}
        self.asked: list[Any] = []
        self.communicator: Any = FanOutCommunicator(self.asked.append, count)
        questions.ask_who_is_there(lambda: self.there)

    def answer(self, question: Any, rank: int = 0) -> None:
        reply: Any
        if isinstance(question, GetInternalStateReq):
            reply = GetInternalStateReqOutput(internal_state={"rank": rank})
        else:
            reply = FlushCacheReqOutput(success=True)
        # As SGLang's sender does it.
        reply.http_worker_ipc = question.http_worker_ipc
        handle_recv(self.communicator, reply)

    async def until_asked(self, times: int = 1) -> Any:
        while len(self.asked) < times:
            await asyncio.sleep(0.001)
        return self.asked[-1]


def run(journey: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(journey(), 20))


def states(answers: list[Any]) -> list[int]:
    return [answer.internal_state["rank"] for answer in answers]


def test_all_ranks_answer() -> None:
    async def journey() -> None:
        ranks = Ranks(3)
        task = asyncio.create_task(call(ranks.communicator, GetInternalStateReq()))
        question = await ranks.until_asked()
        for rank in range(3):
            ranks.answer(question, rank)
        assert states(await task) == [0, 1, 2]

    run(journey)


def test_a_rank_that_is_away_is_not_waited_for() -> None:
    async def journey() -> None:
        ranks = Ranks(3)
        ranks.there = {RankThere(0, 0), RankThere(2, 0)}
        task = asyncio.create_task(call(ranks.communicator, FlushCacheReqInput()))
        question = await ranks.until_asked()
        ranks.answer(question)
        ranks.answer(question)
        assert len(await task) == 2

    run(journey)


@pytest.mark.parametrize("then", [set(), {RankThere(1, 1)}])
def test_a_rank_that_dies_meanwhile_is_not_waited_for_even_if_it_is_back(then: set[RankThere]) -> None:
    async def journey() -> None:
        ranks = Ranks(2)
        task = asyncio.create_task(call(ranks.communicator, FlushCacheReqInput()))
        ranks.answer(await ranks.until_asked())
        ranks.there = {RankThere(0, 0)} | then
        assert len(await task) == 1

    run(journey)


def test_who_reads_gets_what_is_known_when_a_rank_is_silent() -> None:
    async def journey() -> None:
        ranks = Ranks(2)
        assert await call(ranks.communicator, GetInternalStateReq()) == []
        task = asyncio.create_task(call(ranks.communicator, GetInternalStateReq()))
        question = await ranks.until_asked(2)
        ranks.answer(question, 0)
        assert states(await task) == [0]
        task = asyncio.create_task(call(ranks.communicator, GetInternalStateReq()))
        question = await ranks.until_asked(3)
        for rank in range(2):
            ranks.answer(question, rank)
        assert states(await task) == [0, 1]
        # Nobody answers, or nobody is there: what was known last.
        assert states(await call(ranks.communicator, GetInternalStateReq())) == [0, 1]
        ranks.there = set()
        assert states(await call(ranks.communicator, GetInternalStateReq())) == [0, 1]

    run(journey)


@pytest.mark.parametrize("asked", [FlushCacheReqInput, ProfileReq])
def test_who_changes_something_hears_that_it_was_not_done_everywhere(asked: type[Any]) -> None:
    async def journey() -> None:
        ranks = Ranks(2)
        task = asyncio.create_task(call(ranks.communicator, asked()))
        ranks.answer(await ranks.until_asked())
        with pytest.raises(fastapi.HTTPException, match="1 of 2 ranks") as refused:
            await task
        assert refused.value.status_code == 503
        ranks.there = set()
        with pytest.raises(fastapi.HTTPException, match="no rank is there"):
            await call(ranks.communicator, asked())

    run(journey)


def test_late_answers_are_not_those_to_the_next_question() -> None:
    async def journey() -> None:
        ranks = Ranks(1)
        with pytest.raises(fastapi.HTTPException):
            await call(ranks.communicator, FlushCacheReqInput())
        task = asyncio.create_task(call(ranks.communicator, FlushCacheReqInput()))
        second = await ranks.until_asked(2)
        ranks.answer(ranks.asked[0])
        await asyncio.sleep(0.1)
        assert not task.done()
        ranks.answer(second)
        assert len(await task) == 1
        ranks.answer(second)  # nobody waits

    run(journey)


def test_one_question_does_not_hold_up_others_and_readers_share_one() -> None:
    async def journey() -> None:
        ranks = Ranks(1)
        loop = asyncio.get_running_loop()
        began = loop.time()
        found = await asyncio.gather(*(call(ranks.communicator, GetInternalStateReq()) for _ in range(50)))
        assert found == [[]] * 50
        assert len(ranks.asked) == 1
        flushes = [call(ranks.communicator, FlushCacheReqInput()) for _ in range(20)]
        refused = await asyncio.gather(*flushes, return_exceptions=True)
        assert {getattr(each, "status_code", None) for each in refused} == {503}
        # Waiting in line counts: not one limit after the other.
        assert loop.time() - began < 5

    run(journey)


def test_a_client_that_goes_away_leaves_the_line() -> None:
    async def journey() -> None:
        ranks = Ranks(1)
        gone = asyncio.create_task(call(ranks.communicator, FlushCacheReqInput()))
        await ranks.until_asked()
        gone.cancel()
        task = asyncio.create_task(call(ranks.communicator, FlushCacheReqInput()))
        ranks.answer(await ranks.until_asked(2))
        assert len(await task) == 1

    run(journey)


def test_without_a_router_every_rank_is_expected() -> None:
    async def journey() -> None:
        ranks = Ranks(2)
        ranks.there = None
        task = asyncio.create_task(call(ranks.communicator, GetInternalStateReq()))
        question = await ranks.until_asked()
        ranks.answer(question, 1)
        assert states(await task) == [1]

    run(journey)


def test_every_question_of_sglang_s_is_one_of_these() -> None:
    from sglang.srt.managers import tokenizer_control_mixin

    assert tokenizer_control_mixin.FanOutCommunicator is FanOutCommunicator
    assert {"get_internal_state", "flush_cache", "profile"} <= {
        s[0] for s in tokenizer_control_mixin._COMMUNICATOR_SPECS
    }
    # Ranks copy who asked into their answer, by which an answer is known.
    for _, answer, *_ in tokenizer_control_mixin._COMMUNICATOR_SPECS:
        assert "http_worker_ipc" in answer.__struct_fields__, answer
