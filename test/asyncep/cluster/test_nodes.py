"""Nodes that die and come back cost no answer."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import ByteTokens, ToyServer, log_likelihood, toy_facts

from asyncep.client.errors import RejectedError, ServerError
from asyncep.client.probes import Probe, Reading
from asyncep.client.scorer import Scorer
from asyncep.cluster.nodes import NodeLostError, Nodes, joint_facts
from asyncep.tasks.session import Session
from asyncep.tasks.task import TaskOptions, TextScores


class ToyNode:
    """Dies at its `dies`-th question, while it has others under way, and comes back if it is to."""

    def __init__(self, name: str, dies: int | None, returns: bool) -> None:
        self.name, self.server = name, ToyServer(turns=3)
        self._dies, self._returns = dies, returns
        self._asked = 0

    async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
        self._asked += 1
        found = await self.server.answer(probes, rank)
        if self._dies is not None and self._asked >= self._dies:
            raise NodeLostError("it died")
        return found

    async def get(self, path: str) -> Any:
        raise NodeLostError("it died")

    post = get  # type: ignore[assignment]

    async def back(self) -> None:
        await asyncio.sleep(0)
        if not self._returns:
            raise NodeLostError("for good")
        self._dies = None


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.none() | st.integers(1, 4), st.booleans(), st.integers(1, 2)), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_every_prompt_has_its_answer_whatever_dies(nodes: list[tuple[int | None, bool, int]], seed: int) -> None:
    chance = random.Random(seed)
    texts = [f"text {chance.randrange(30)}" for _ in range(40)]
    survives = any(dies is None or returns for dies, returns, _ in nodes)

    async def run() -> list[TextScores | str]:
        toys = [ToyNode(f"node {i}", dies, returns) for i, (dies, returns, _) in enumerate(nodes)]
        facts = [toy_facts(ranks) for _, _, ranks in nodes]
        joined = Nodes(toys, facts)
        joint = joint_facts(facts)
        assert joint.ranks == sum(ranks for _, _, ranks in nodes)
        async with Scorer(joined, joint) as scorer:
            session = Session(scorer, ByteTokens(), None)
            found = await session.score_texts(texts, await session.prepare(TaskOptions(["yes", "no"], "{text}")))
        for toy, (_, _, ranks) in zip(toys, nodes, strict=True):
            # A node with one rank names none; others are asked for theirs, or for any when they help out.
            assert {rank for rank, _ in toy.server.asked} <= ({None} if ranks == 1 else {None, *range(ranks)})
        await joined.close()
        return found

    if not survives:
        # Perhaps nobody is asked so often as to die; then there are answers all the same.
        with contextlib.suppress(ServerError):
            asyncio.run(run())
        return
    found = asyncio.run(run())
    for text, scores in zip(texts, found, strict=True):
        assert isinstance(scores, TextScores)
        expected = [log_likelihood(list(text.encode()), list(f" {label}".encode())) for label in ("yes", "no")]
        assert scores.scores == pytest.approx(expected)


def test_a_refusal_is_no_loss() -> None:
    async def run() -> None:
        node = ToyNode("node", None, True)
        joined = Nodes([node], [toy_facts(1)])
        with pytest.raises(RejectedError):
            await joined.answer([Probe([ord("!")], [1])], 0)
        assert await joined.answer([Probe([5], [1])], 0)

    asyncio.run(run())


def test_nodes_of_different_models_are_refused() -> None:
    with pytest.raises(ServerError, match="different models: other, toy"):
        joint_facts([toy_facts(), replace(toy_facts(), model="other")])


def test_nothing_is_answered_once_every_node_is_lost() -> None:
    async def run() -> None:
        joined = Nodes([ToyNode("a", 1, False), ToyNode("b", 1, False)], [toy_facts(1)] * 2)
        with pytest.raises(ServerError, match="every node is lost"):
            await joined.answer([Probe([5], [1])], 0)

    asyncio.run(run())
