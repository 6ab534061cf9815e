"""Everything between token ids and label scores: limits, plan, lanes, and the count of what it took."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from asyncep.client.labels import LabelScores, LabelSet
from asyncep.client.lanes import Lanes, OnBatch
from asyncep.client.plan import Plan, Shape, plan
from asyncep.client.probes import Answerer
from asyncep.client.server_facts import ServerFacts
from asyncep.client.together import Together
from asyncep.client.tokens import Untokenized

# A call of so many prompts at most is taken for somebody's who waits: it goes with the server's other requests. A
# larger one is work like a batch's and waits for them.
INTERACTIVE_PROMPTS = 64
# Planning fewer prompts than this takes less time than moving to a thread.
_PLAN_HERE = 256


@dataclass
class Totals:
    """What was computed so far.

    Attributes:
        prompts: distinct prompts answered; refused ones are not in it.
        tokens: tokens of all passes.
        cached: of them from the prefix cache.
        possible_cached: of them that the plans could at best have from it (first passes only).
        flops: net of the cache; 0 where the model's shape is not known.
        full_flops: what it would have been without it.
    """

    prompts: int = 0
    tokens: int = 0
    cached: int = 0
    possible_cached: int = 0
    flops: int = 0
    full_flops: int = 0

    @property
    def cached_share(self) -> float:
        """Share of tokens that came from the prefix cache; 0 before the first."""
        return self.cached / self.tokens if self.tokens else 0.0


class Scorer:
    """Scores labels after prompts on one server. Use it in an ``async with``.

    Args:
        answerer: who computes.
        facts: what is known of it.
        in_flight: batches a rank has at a time; the one being computed and one to go on with.
        behind: who computes what can wait for others' requests; None where the server makes no difference.
    """

    def __init__(
        self, answerer: Answerer, facts: ServerFacts, *, in_flight: int = 2, behind: Answerer | None = None
    ) -> None:
        self.facts = facts
        self.totals = Totals()
        self._answerer = answerer
        self._behind = behind or answerer
        self._shape = Shape(facts.ranks, facts.threshold, facts.page, distance=in_flight)
        self._lanes = Lanes(facts.ranks, addressable=facts.addressable, in_flight=in_flight)
        self._held: Sequence[int] = ()
        self._together = Together(self._score_now)

    async def __aenter__(self) -> Scorer:
        await self._lanes.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._together.close()
        await self._lanes.__aexit__(kind, error, trace)

    def coming(self, prompts: int, *, behind: bool = False) -> contextlib.AbstractContextManager[None]:
        """Says that a call of so many prompts is about to be made, for the length of what comes before it."""
        small = not behind and prompts <= INTERACTIVE_PROMPTS
        return self._together.coming() if small else contextlib.nullcontext()

    async def score(
        self,
        prompts: Sequence[Sequence[int]],
        labels: LabelSet,
        on_batch: OnBatch[LabelScores] | None = None,
        *,
        behind: bool = False,
    ) -> list[LabelScores | str]:
        """Scores of each prompt, or why there are none. Equal prompts are computed once.

        Small calls that come at the same time are planned together.

        Args:
            prompts: token ids.
            on_batch: told of each batch as it comes: numbers of prompts (equal ones all) and their results.
            behind: nobody waits for it, however few they are.

        Raises:
            ServerError: the server failed.
        """
        results: list[LabelScores | str] = ["not answered"] * len(prompts)

        def take(numbers: Sequence[int], answers: Sequence[LabelScores | str]) -> None:
            for number, answer in zip(numbers, answers, strict=True):
                results[number] = answer
            if on_batch:
                on_batch(numbers, answers)

        if behind or len(prompts) > INTERACTIVE_PROMPTS:
            await self._score_now(prompts, labels, take, behind=True)
        elif prompts:
            await self._together.score(prompts, labels, take)
        return results

    async def _score_now(
        self,
        prompts: Sequence[Sequence[int]],
        labels: LabelSet,
        on_batch: OnBatch[LabelScores],
        *,
        behind: bool = False,
    ) -> None:
        """Plans and computes them."""
        refused: dict[int, str] = {}
        good = []
        for number, prompt in enumerate(prompts):
            if reason := self._refuse(prompt, labels):
                refused[number] = reason
            else:
                good.append(number)
        if refused:
            on_batch(list(refused), list(refused.values()))
        chosen = [prompts[number] for number in good]
        planned = await self._plan(chosen)
        twins: dict[int, list[int]] = {}
        for place, first in enumerate(planned.same_as):
            twins.setdefault(first, []).append(good[place])

        def take(rows: Sequence[int], answers: Sequence[LabelScores | str]) -> None:
            numbers: list[int] = []
            told: list[LabelScores | str] = []
            for row, answer in zip(rows, answers, strict=True):
                self._count(answer)
                numbers += twins[row]
                told += [answer] * len(twins[row])
            on_batch(numbers, told)

        answerer = self._behind if behind else self._answerer

        async def ask(some: Sequence[Sequence[int]], rank: int | None) -> list[LabelScores]:
            return await labels.score(some, answerer, rank)

        await self._lanes.run(planned, chosen, ask, take)
        self.totals.possible_cached += planned.possible_cached

    def reset_totals(self) -> None:
        """Counts from zero again."""
        self.totals = Totals()

    def _refuse(self, prompt: Sequence[int], labels: LabelSet) -> str | None:
        if isinstance(prompt, Untokenized):
            return prompt.reason
        if not len(prompt):
            return "the prompt has no tokens"
        most = self.facts.most_tokens
        if most is not None and len(prompt) + labels.longest_tail > most:
            return (
                f"the prompt has {len(prompt) + labels.longest_tail} tokens with its label and the model's context "
                f"length leaves room for {most}; shorten it"
            )
        return None

    async def _plan(self, prompts: Sequence[Sequence[int]]) -> Plan:
        held = [self._held] if len(self._held) else []
        self._held = common_beginning(prompts) or self._held
        if len(prompts) < _PLAN_HERE:
            return plan(prompts, self.facts.cost, self._shape, held=held)
        return await asyncio.to_thread(plan, prompts, self.facts.cost, self._shape, held=held)

    def _count(self, answer: LabelScores | str) -> None:
        if isinstance(answer, str):
            return
        totals = self.totals
        totals.prompts += 1
        for tokens, cached in answer.passes:
            totals.tokens += tokens
            totals.cached += cached
            if self.facts.counts_flops:
                totals.flops += self.facts.cost.flops(tokens - cached, cached)
                totals.full_flops += self.facts.cost.flops(tokens)


def common_beginning(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """What all prompts begin with: the two that differ earliest are the least and the greatest."""
    if len(prompts) < 2:
        return ()
    least, most = min(map(list, prompts)), max(map(list, prompts))
    same = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), min(len(least), len(most)))
    return least[:same]
