"""The scorer on a toy model: lanes, limits, refusals, failures."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import REFUSED, ToyServer, log_likelihood, toy_facts

from asyncep.client.errors import ServerError
from asyncep.client.labels import LabelScores, LabelSet
from asyncep.client.probes import Probe, Reading
from asyncep.client.scorer import Scorer

LABELS = LabelSet([[1], [2, 3]])


def score(
    prompts: Sequence[Sequence[int]], server: ToyServer, *, ranks: int = 2, in_flight: int = 2
) -> tuple[list[LabelScores | str], list[int], Scorer]:
    told: list[int] = []

    async def run() -> tuple[list[LabelScores | str], Scorer]:
        async with Scorer(server, toy_facts(ranks), in_flight=in_flight) as scorer:
            return await scorer.score(prompts, LABELS, lambda numbers, _: told.extend(numbers)), scorer

    found, scorer = asyncio.run(run())
    return found, told, scorer


prompt = st.lists(st.integers(0, 40), max_size=12)


@settings(max_examples=60)
@given(st.lists(prompt, max_size=40), st.integers(1, 3), st.integers(1, 3))
def test_each_prompt_gets_its_answer_or_its_reason(prompts: list[list[int]], ranks: int, in_flight: int) -> None:
    server = ToyServer()
    found, told, scorer = score(prompts, server, ranks=ranks, in_flight=in_flight)
    assert sorted(told) == list(range(len(prompts)))
    for ids, result in zip(prompts, found, strict=True):
        if not ids:
            assert result == "the prompt has no tokens"
        elif REFUSED in ids:
            assert result == "refused"
        else:
            assert isinstance(result, LabelScores)
            assert result.scores == pytest.approx((log_likelihood(ids, [1]), log_likelihood(ids, [2, 3])))
    assert server.most_in_flight <= ranks * in_flight
    good = {tuple(ids) for ids in prompts if ids and REFUSED not in ids}
    assert scorer.totals.prompts == len(good)


def test_equal_prompts_are_computed_once_and_ranks_are_named() -> None:
    server = ToyServer()
    score([[5, 6], [7, 8], [5, 6]] * 50, server)
    firsts = [p for p in server.prompts if len(p) == 2]
    assert sorted(firsts) == [(5, 6), (7, 8)]
    assert {rank for rank, _ in server.asked} <= {0, 1}


def test_one_rank_is_not_named() -> None:
    server = ToyServer()
    score([[5, 6]], server, ranks=1)
    assert {rank for rank, _ in server.asked} == {None}


def test_prompts_too_long_for_the_model_are_not_sent() -> None:
    server = ToyServer()
    found, _, _ = score([[1] * 4000, [2, 3]], server)
    assert found[0] == (
        "the prompt has 4001 tokens with its label and the model's context length leaves room for 4000; shorten it"
    )
    assert isinstance(found[1], LabelScores)
    assert all(len(ids) < 10 for ids in server.prompts)


def test_a_lead_is_answered_before_its_company_is_sent() -> None:
    shots = [9] * 200

    class Watchful(ToyServer):
        warm: set[int | None]

        async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
            if len(probes) > 1:
                assert rank in self.warm
            found = await super().answer(probes, rank)
            self.warm.add(rank)
            return found

    server = Watchful(turns=20)
    server.warm = set()
    asyncio.run(_single(server, [[*shots, row % 30, row // 30] for row in range(300)]))
    assert {len(prompts) for _, prompts in server.asked[:2]} == {1}


async def _single(server: ToyServer, prompts: list[list[int]]) -> None:
    async with Scorer(server, toy_facts(2)) as scorer:
        assert all(isinstance(s, LabelScores) for s in await scorer.score(prompts, LabelSet([[1], [2]])))


def test_an_idle_rank_helps_a_slow_one() -> None:
    class OneIsSlow(ToyServer):
        async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
            if rank == 0:
                for _ in range(400):
                    await asyncio.sleep(0)
            return await super().answer(probes, rank)

    server = OneIsSlow()
    asyncio.run(_single(server, [[row % 30, row // 30, *[row % 7] * 60] for row in range(200)]))
    by_rank = [sum(len(prompts) for rank, prompts in server.asked if rank == r) for r in (0, 1)]
    assert by_rank[1] > 2 * by_rank[0]


def test_a_failed_server_ends_the_run_and_not_the_next() -> None:
    class Failing(ToyServer):
        broken = True

        async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
            if self.broken:
                raise ServerError("gone")
            return await super().answer(probes, rank)

    async def run() -> None:
        server = Failing()
        async with Scorer(server, toy_facts(2)) as scorer:
            with pytest.raises(ServerError, match="gone"):
                await scorer.score([[i] for i in range(500)], LABELS)
            server.broken = False
            assert all(isinstance(s, LabelScores) for s in await scorer.score([[1], [2]], LABELS))

    asyncio.run(run())
