"""Calls that are made together are planned together, and have nothing else in common."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_model import ByteTokens, ToyServer, log_likelihood, toy_facts

from asyncep.client.errors import ServerError
from asyncep.client.labels import LabelScores, LabelSet
from asyncep.client.probes import Probe, Reading
from asyncep.client.scorer import Scorer
from asyncep.tasks.session import session_with
from asyncep.tasks.task import TaskOptions

LABELS = LabelSet([[1], [2, 3]])


class Gate(ToyServer):
    """Answers nothing until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()

    async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
        await self.open.wait()
        return await super().answer(probes, rank)


def test_many_single_calls_take_about_as_many_batches_as_one_list() -> None:
    texts = [f"text number {i}" for i in range(200)]
    options = TaskOptions(["a", "b"], "{text}:")

    async def calls(*, single: bool) -> tuple[int, list[object]]:
        server = ToyServer(turns=20)
        async with session_with(server, ByteTokens(), toy_facts()) as session:
            if single:
                found = await asyncio.gather(*(session.classify_as([text], options) for text in texts))
                answers = [answer for [answer] in found]
            else:
                answers = await session.classify_as(texts, options)
        return len(server.asked), [answer.probabilities for answer in answers]

    singly, one = asyncio.run(calls(single=True))
    at_once, other = asyncio.run(calls(single=False))
    assert one == other
    assert singly <= 1.2 * at_once


def test_what_comes_while_calls_are_under_way_is_planned_together() -> None:
    async def run() -> list[int]:
        server, others = Gate(), LabelSet([[1]])
        async with Scorer(server, toy_facts()) as scorer:
            tasks = []
            for i in range(40):
                tasks.append(asyncio.create_task(scorer.score([[7, i, 1]], others if i % 2 else LABELS)))
                await asyncio.sleep(0.002)
            server.open.set()
            await asyncio.gather(*tasks)
        return [len(prompts) for _, prompts in server.asked]

    sizes = asyncio.run(run())
    # Two plans of one prompt; then all others of each set of labels, over two ranks.
    assert max(sizes) >= 9


@given(
    st.lists(st.tuples(st.lists(st.integers(4, 9), min_size=1, max_size=3), st.booleans()), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_each_call_has_its_own_answers(calls: list[tuple[list[int], bool]], chance: object) -> None:
    sets = {True: LabelSet([[1], [2, 3]]), False: LabelSet([[5], [6], [7]])}

    async def run() -> list[list[LabelScores | str]]:
        async with Scorer(ToyServer(), toy_facts()) as scorer:
            return await asyncio.gather(
                *(scorer.score([[40, token] for token in tokens], sets[which]) for tokens, which in calls)
            )

    for (tokens, which), answers in zip(calls, asyncio.run(run()), strict=True):
        for token, answer in zip(tokens, answers, strict=True):
            assert isinstance(answer, LabelScores)
            expected = [log_likelihood([40, token], label) for label in sets[which].ids]
            assert answer.scores == pytest.approx(expected)


def test_a_refused_prompt_and_a_cancelled_call_hurt_no_other() -> None:
    async def run() -> None:
        server = Gate()
        async with Scorer(server, toy_facts(), in_flight=2) as scorer:
            tasks = [asyncio.create_task(scorer.score([[9, i]], LABELS)) for i in (1, ord("!"), 3, 4)]
            await asyncio.sleep(0.05)
            tasks[2].cancel()
            server.open.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[2], asyncio.CancelledError)
        assert results[1] == ["refused"]
        for i, number in ((1, 0), (4, 3)):
            [answer] = results[number]  # type: ignore[misc] # a list
            assert answer.scores == pytest.approx([log_likelihood([9, i], label) for label in LABELS.ids])

    asyncio.run(run())


def test_a_plan_that_nobody_waits_for_is_given_up() -> None:
    async def run() -> None:
        server = Gate()
        async with Scorer(server, toy_facts(threshold=4)) as scorer:
            tasks = [asyncio.create_task(scorer.score([[9, i]], LABELS)) for i in range(300)]
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            server.open.set()
            # It goes on with others.
            [answer] = await scorer.score([[1, 2]], LABELS)
            assert isinstance(answer, LabelScores)
        assert len(server.prompts) < 50

    asyncio.run(run())


def test_closing_ends_all_who_wait() -> None:
    async def run() -> list[object]:
        scorer = Scorer(Gate(), toy_facts(threshold=4))
        await scorer.__aenter__()
        tasks = [asyncio.create_task(scorer.score([[9, i]], LABELS)) for i in range(20)]
        await asyncio.sleep(0.05)
        tasks.append(asyncio.create_task(scorer.score([[9, 30]], LABELS)))
        await asyncio.sleep(0)
        await scorer.__aexit__(None, None, None)
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        with pytest.raises(ServerError, match="the client is closed"):
            await scorer.score([[1]], LABELS)
        return found

    assert all(isinstance(found, asyncio.CancelledError) for found in asyncio.run(run()))


def test_a_failure_is_everybodys() -> None:
    class Broken(ToyServer):
        async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
            raise ServerError("gone")

    async def run() -> list[object]:
        async with Scorer(Broken(), toy_facts()) as scorer:
            return await asyncio.gather(*(scorer.score([[i]], LABELS) for i in range(5)), return_exceptions=True)

    assert [str(error) for error in asyncio.run(run())] == ["gone"] * 5
