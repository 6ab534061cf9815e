"""Runs plans: each rank works through its lane, a few batches in flight, and helps another when its own is empty."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, TypeVar

from asyncep.client.errors import NOT_THE_PROMPTS, RejectedError
from asyncep.client.plan import Batch, Plan

T = TypeVar("T")
Prompts = Sequence[Sequence[int]]
# Asks one rank (None: whichever) for the answers to some prompts.
Ask = Callable[[Prompts, int | None], Awaitable[list[T]]]
# Row numbers and what became of each: an answer, or the reason why there is none.
OnBatch = Callable[[Sequence[int], Sequence[T | str]], None]


@dataclass(eq=False)
class _Run(Generic[T]):
    """One plan under way."""

    prompts: Prompts
    ask: Ask[T]
    on_batch: OnBatch[T]
    done: list[list[asyncio.Event]]
    left: int
    finished: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(eq=False)
class _Job:
    run: _Run[object]
    batch: Batch
    lane: int
    number: int


class Lanes:
    """The ranks' queues. Several plans may be under way; they are worked off in the order they came.

    Args:
        ranks: lanes.
        addressable: batches name the rank of their lane; otherwise the server places them.
        in_flight: batches of a lane sent and not answered.
    """

    def __init__(self, ranks: int, *, addressable: bool, in_flight: int = 2) -> None:
        self._addressable = addressable
        self._in_flight = in_flight
        self._queues: list[deque[_Job]] = [deque() for _ in range(ranks)]
        self._work = asyncio.Condition()
        self._workers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Lanes:
        self._workers = [
            asyncio.create_task(self._worker(lane)) for lane in range(len(self._queues)) for _ in range(self._in_flight)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def run(self, plan: Plan, prompts: Prompts, ask: Ask[T], on_batch: OnBatch[T]) -> None:
        """Runs a plan and returns when each of its batches has been given to `on_batch`.

        Raises:
            ServerError: the server failed; the rest of the plan is dropped.
            RejectedError: it takes nothing from this client, whatever is asked; the same.
        """
        batches = sum(map(len, plan.lanes))
        if not batches:
            return
        events = [[asyncio.Event() for _ in lane] for lane in plan.lanes]
        run = _Run(prompts, ask, on_batch, events, batches)
        async with self._work:
            for lane, planned in enumerate(plan.lanes):
                for number, batch in enumerate(planned):
                    self._queues[lane].append(_Job(run, batch, lane, number))  # type: ignore[arg-type]
            self._work.notify_all()
        try:
            await run.finished
        finally:
            # Cancelled or failed: what has not been sent is not sent any more.
            for queue in self._queues:
                kept = [job for job in queue if job.run is not run]
                queue.clear()
                queue.extend(kept)

    def _take(self, lane: int) -> _Job | None:
        """The next batch of the lane, or the last of the longest other one that has more than its rank can start."""
        if self._queues[lane]:
            return self._queues[lane].popleft()
        longest = max(self._queues, key=len)
        return longest.pop() if len(longest) > 1 else None

    async def _worker(self, lane: int) -> None:
        while True:
            async with self._work:
                while (job := self._take(lane)) is None:
                    await self._work.wait()
            await self._do(job, lane)

    async def _do(self, job: _Job, lane: int) -> None:
        run = job.run
        events = run.done[job.lane]
        if job.batch.after is not None:
            await events[job.batch.after].wait()
        try:
            if not run.finished.done():
                answers = await self._answers(run, job.batch.rows, lane if self._addressable else None)
                if not run.finished.done():
                    run.on_batch(job.batch.rows, answers)
        except asyncio.CancelledError:
            run.finished.cancel()
            raise
        except Exception as error:  # whatever it is, it is for whoever waits for the run, not for this worker
            if not run.finished.done():
                run.finished.set_exception(error)
        events[job.number].set()
        run.left -= 1
        if not run.left and not run.finished.done():
            run.finished.set_result(None)

    async def _answers(self, run: _Run[object], rows: Sequence[int], rank: int | None) -> list[object | str]:
        try:
            return list(await run.ask([run.prompts[row] for row in rows], rank))
        except RejectedError as rejected:
            if rejected.status in NOT_THE_PROMPTS:
                raise
            if len(rows) == 1:
                return [str(rejected)]
            # One row spoils a batch: halve until it stands alone with its reason and the others have their answers.
            middle = len(rows) // 2
            first = await self._answers(run, rows[:middle], rank)
            return first + await self._answers(run, rows[middle:], rank)
