"""Small calls that are made at the same time are planned as one: a thousand callers with one text each cost what one
caller with a thousand texts does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from asyncep.client.errors import ServerError
from asyncep.client.labels import LabelScores, LabelSet
from asyncep.client.lanes import OnBatch

# Scores prompts, telling of each batch.
Score = Callable[[Sequence[Sequence[int]], LabelSet, OnBatch[LabelScores]], Awaitable[None]]

# How long the first call waits for others: callers in another thread come in bursts.
_BURST_SECONDS = 0.001
# How long calls wait at most for one whose texts are being tokenized.
_COMING_SECONDS = 0.02
# Plans of such calls under way. What comes meanwhile is planned together when one of them is done.
_PLANS = 2


@dataclass(eq=False)
class _Call:
    prompts: Sequence[Sequence[int]]
    labels: LabelSet
    on_batch: OnBatch[LabelScores]
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Together:
    """Gathers calls. Belongs to one event loop.

    Args:
        score: computes the prompts of some calls with the same labels.
    """

    def __init__(self, score: Score) -> None:
        self._score = score
        self._waiting: list[_Call] = []
        self._plans: set[asyncio.Task[None]] = set()
        self._pump: asyncio.Task[None] | None = None
        self._calls: set[_Call] = set()
        self._closed = False
        self._coming = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    @contextlib.contextmanager
    def coming(self) -> Iterator[None]:
        """Says that a call is about to be made: its texts are being tokenized."""
        self._coming += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._coming -= 1
            if not self._coming:
                self._quiet.set()

    async def score(self, prompts: Sequence[Sequence[int]], labels: LabelSet, on_batch: OnBatch[LabelScores]) -> None:
        """Scores the prompts, with those of other calls.

        Args:
            on_batch: told of each batch as it comes: numbers of this call's prompts, and their results.

        Raises:
            ServerError: the server failed.
        """
        if self._closed:
            raise ServerError("the client is closed; use it in an async with")
        call = _Call(prompts, labels, on_batch)
        self._calls.add(call)
        call.done.add_done_callback(lambda _: self._calls.discard(call))
        self._waiting.append(call)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._plan_all())
        await call.done

    async def close(self) -> None:
        """Cancels what is under way, and those who wait for it."""
        self._closed = True
        for call in tuple(self._calls):
            call.done.cancel()
        tasks = [*self._plans, *([self._pump] if self._pump else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _plan_all(self) -> None:
        """Makes plans of the calls that wait until none does."""
        while self._waiting:
            await asyncio.sleep(_BURST_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_COMING_SECONDS):
                    await self._quiet.wait()
            while len(self._plans) >= _PLANS:
                await asyncio.wait(self._plans, return_when=asyncio.FIRST_COMPLETED)
            calls, self._waiting = self._waiting, []
            by_labels: dict[int, list[_Call]] = {}
            for call in calls:
                if not call.done.done():
                    by_labels.setdefault(id(call.labels), []).append(call)
            for group in by_labels.values():
                plan = asyncio.create_task(self._run(group))
                self._plans.add(plan)
                plan.add_done_callback(self._plans.discard)
                give_up = _GiveUp(plan, len(group))
                for call in group:
                    call.done.add_done_callback(give_up)

    async def _run(self, calls: Sequence[_Call]) -> None:
        prompts = [prompt for call in calls for prompt in call.prompts]
        owners = [(call, number) for call in calls for number in range(len(call.prompts))]

        def take(numbers: Sequence[int], results: Sequence[LabelScores | str]) -> None:
            mine: dict[int, tuple[_Call, list[int], list[LabelScores | str]]] = {}
            for number, result in zip(numbers, results, strict=True):
                call, place = owners[number]
                _, places, found = mine.setdefault(id(call), (call, [], []))
                places.append(place)
                found.append(result)
            for call, places, found in mine.values():
                if not call.done.done():
                    call.on_batch(places, found)

        try:
            await self._score(prompts, calls[0].labels, take)
        except asyncio.CancelledError:
            for call in calls:
                call.done.cancel()
            raise
        except Exception as error:  # whatever it is, it is for those who wait
            for call in calls:
                if not call.done.done():
                    call.done.set_exception(error)
            return
        for call in calls:
            if not call.done.done():
                call.done.set_result(None)


@dataclass
class _GiveUp:
    """Stops a plan that nobody waits for any more.

    Attributes:
        waiting: callers who do.
    """

    plan: asyncio.Task[None]
    waiting: int

    def __call__(self, _: asyncio.Future[None]) -> None:
        """One caller has its answers, or has gone."""
        self.waiting -= 1
        if not self.waiting and not self.plan.done():
            self.plan.cancel()
