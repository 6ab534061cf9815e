"""Many hosts' ranks as one server's. A host that is lost costs no answer: others give it. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from asyncep.client.errors import ServerError
from asyncep.client.probes import Probe, Reading
from asyncep.client.server_facts import ServerFacts

logger = logging.getLogger("asyncep")

# A batch that is the end of so many nodes may be the reason.
_MOST_LOSSES = 5


class NodeLostError(RuntimeError):
    """The node did not answer and will not: it has died, or its server has."""


class Node(Protocol):
    """One host with ranks, as `batching.generate.GenerateClient` is one."""

    name: str

    async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
        """See `probes.Answerer`; a node that is gone raises NodeLostError."""
        ...

    async def get(self, path: str) -> Any:
        """The decoded answer of its server to a GET; NodeLostError as above."""
        ...

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The same of a POST."""
        ...

    async def back(self) -> None:
        """Returns when the node answers again; raises NodeLostError if it never will."""
        ...


class Nodes:
    """Answers for several nodes. Ranks are counted through: first all of the first node, then those of the next.

    Args:
        nodes: at least one.
        facts: of each, in order.
        patience: seconds to wait for a node when none is left.
    """

    def __init__(self, nodes: Sequence[Node], facts: Sequence[ServerFacts], *, patience: float = 600) -> None:
        self.url = f"{len(nodes)} node(s)"
        self._patience = patience
        self._ranks = [
            (node, rank if fact.addressable else None)
            for node, fact in zip(nodes, facts, strict=True)
            for rank in range(fact.ranks)
        ]
        self._alive = dict.fromkeys(nodes, 0)  # batches under way on each
        self._waiting: dict[Node, asyncio.Task[None]] = {}
        self._change = asyncio.Condition()

    async def close(self) -> None:
        """Waits for no node any more."""
        for task in self._waiting.values():
            task.cancel()
        await asyncio.gather(*self._waiting.values(), return_exceptions=True)

    async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
        """See `probes.Answerer`. Without its node, a rank's probes go to the node with the least under way.

        Raises:
            ServerError: every node is lost, or node after node is with these probes.
        """
        home, local = (None, None) if rank is None else self._ranks[rank]
        for _ in range(_MOST_LOSSES):
            node = home if home in self._alive else await self._any()
            assert node is not None
            self._alive[node] += 1
            try:
                return await node.answer(probes, local if node is home else None)
            except NodeLostError as error:
                self._lost(node, error)
            finally:
                if node in self._alive:
                    # It may have come back meanwhile, with nothing under way.
                    self._alive[node] = max(0, self._alive[node] - 1)
        raise ServerError(f"{_MOST_LOSSES} nodes were lost one after the other with the same batch")

    async def get(self, path: str) -> Any:
        """See `GenerateClient.get`; any node answers."""
        while True:
            node = await self._any()
            try:
                return await node.get(path)
            except NodeLostError as error:
                self._lost(node, error)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """See `GenerateClient.post`; any node answers."""
        while True:
            node = await self._any()
            try:
                return await node.post(path, body)
            except NodeLostError as error:
                self._lost(node, error)

    async def _any(self) -> Node:
        """The node with the least under way; waits for one if there is none now."""
        async with self._change:
            try:
                async with asyncio.timeout(self._patience):
                    while not self._alive:
                        if not self._waiting:
                            raise ServerError("every node is lost")
                        await self._change.wait()
            except TimeoutError:
                raise ServerError(f"every node is lost, and none came back in {self._patience:.0f} s") from None
            return min(self._alive, key=self._alive.__getitem__)

    def _lost(self, node: Node, error: NodeLostError) -> None:
        if node in self._alive:
            logger.warning("%s is lost (%s); others take over", node.name, error)
            del self._alive[node]
            self._waiting[node] = asyncio.create_task(self._wait(node))

    async def _wait(self, node: Node) -> None:
        try:
            await node.back()
        except NodeLostError:
            found = False
        else:
            found = True
            logger.warning("%s is back", node.name)
        async with self._change:
            if found:
                self._alive[node] = 0
            del self._waiting[node]
            self._change.notify_all()


def joint_facts(facts: Sequence[ServerFacts]) -> ServerFacts:
    """What is to be known of several servers of one model.

    Raises:
        ServerError: they serve different models.
    """
    models = {fact.model for fact in facts}
    if len(models) > 1:
        raise ServerError(f"the nodes serve different models: {', '.join(sorted(models))}")
    limits = [fact.most_tokens for fact in facts if fact.most_tokens is not None]
    return replace(
        facts[0],
        ranks=sum(fact.ranks for fact in facts),
        # Every rank has a node, though a node with one rank names none.
        addressable=True,
        page=max(fact.page for fact in facts),
        most_tokens=min(limits, default=None),
        threshold=max(fact.threshold for fact in facts),
    )
