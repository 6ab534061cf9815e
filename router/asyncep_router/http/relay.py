"""A client's request on its way: placed, sent, tried again elsewhere if need be, answered once."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from http import HTTPStatus
from itertools import count
from typing import TYPE_CHECKING, Any

import aiohttp

from asyncep_router.errors import IntegrityError
from asyncep_router.http.errors import (
    BadRequest,
    QueueTimeout,
    Refusal,
    StreamBroken,
    WorkerTimeout,
    WorkerUnreachable,
)
from asyncep_router.http.judgement import Outcome, Trial, outcome_of
from asyncep_router.http.plans import cached_tokens
from asyncep_router.http.retry import RetryPolicy
from asyncep_router.http.upstream import exchange
from asyncep_router.messages import Dispatch, Request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from asyncep_router.http.desk import Desk
    from asyncep_router.http.fleet import Fleet
    from asyncep_router.http.metrics import Metrics
    from asyncep_router.http.plans import Plan
    from asyncep_router.http.worker import Worker

    Sink = Callable[[aiohttp.ClientResponse], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to pass on. `headers`: those of the worker's that mean something to the client."""

    status: int
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Context:
    """What every attempt for one client request needs. `headers` go to the worker. `ident` is the request's id.

    `client`: whose it is, for sharing the ranks fairly: the key's name, or the address where there are no keys.
    """

    ident: str
    headers: dict[str, str]
    client: str = ""


class _Lost(Exception):
    """An attempt that ended without a reply. `again`: the request may be tried once more."""

    def __init__(self, error: WorkerUnreachable | WorkerTimeout, again: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.again = again


class _Final(Exception):
    """Part of a batch got this answer, so the whole batch gets it."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply


# A second attempt waits this many seconds for the rank that was chosen for it, then goes to any.
_ELSEWHERE_SECONDS = 5.0


class Relay:
    """Sends plans to ranks. `patience`: seconds to wait for a rank; `seconds`: for a worker's answer."""

    def __init__(
        self,
        desk: Desk,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        retry: RetryPolicy,
        *,
        patience: float,
        seconds: float,
    ) -> None:
        self._desk = desk
        self._fleet = fleet
        self._session = session
        self._metrics = metrics
        self._retry = retry
        self._patience = patience
        self._seconds = seconds
        self._numbers = count()

    async def serve(self, plan: Plan, context: Context) -> Reply:
        """The answer to a plan. Raises `Refusal`."""
        if not plan.joined:
            reply = await self._single(plan, context, None)
            if reply is None:
                raise IntegrityError("a plan that is not streamed ended without an answer")
            return reply
        answers: list[Any] = [None] * len(plan.prompts)
        try:
            await self._pieces(plan, range(len(answers)), context, answers, 0, Trial())
        except BaseExceptionGroup as group:
            first = _first_leaf(group)
            if isinstance(first, _Final):
                return first.reply
            raise first from None
        try:
            return Reply(200, plan.merge(answers), _JSON)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise WorkerUnreachable(f"a worker's answer could not be read: {error!r}") from error

    async def stream(self, plan: Plan, context: Context, sink: Sink) -> Reply | None:
        """Stream a worker's answer into `sink`; None when that is done, a reply if it refused. Raises `Refusal`."""
        return await self._single(plan, context, sink)

    # One prompt

    async def _single(self, plan: Plan, context: Context, sink: Sink | None) -> Reply | None:
        attempt = 0
        trial = Trial()
        while True:
            outcome: Reply | Refusal
            dispatch = await self._place(plan, context, trial)
            try:
                if sink is None:
                    reply, _, again = await self._send(plan, [dispatch], (0,), context, trial)
                else:
                    streamed, again = await self._send_stream(plan, dispatch, context, sink, trial)
                    if streamed is None:
                        return None
                    reply = streamed
                if not again:
                    return reply
                outcome = reply
            except _Lost as lost:
                again, outcome = lost.again, lost.error
            if not again or not await self._again(plan, attempt):
                if isinstance(outcome, Refusal):
                    raise outcome
                return outcome
            attempt += 1

    async def _place(self, plan: Plan, context: Context, trial: Trial) -> Dispatch:
        """A rank for the one prompt: after a failure one of another worker, if any has room soon."""
        elsewhere = self._elsewhere(plan, trial)
        if elsewhere is not None:
            waiter = self._desk.submit(self._requests(plan, (0,), context, elsewhere))
            try:
                (dispatch,) = await waiter.take(self._until(_ELSEWHERE_SECONDS))
                return dispatch
            except QueueTimeout:
                pass
            finally:
                self._desk.withdraw(waiter)
        waiter = self._desk.submit(self._requests(plan, (0,), context, None))
        try:
            (dispatch,) = await waiter.take(self._until())
        finally:
            self._desk.withdraw(waiter)
        return dispatch

    # Many prompts

    async def _pieces(
        self,
        plan: Plan,
        indices: Sequence[int],
        context: Context,
        answers: list[Any],
        attempt: int,
        trial: Trial,
        anywhere: bool = False,
    ) -> None:
        """Place prompts, send what one rank gets at a time as one request, put the answers in their places.

        `anywhere`: also at a worker where they failed.
        """
        elsewhere = None if anywhere else self._elsewhere(plan, trial)
        requests = self._requests(plan, indices, context, elsewhere)
        index_of = {request.rid: index for request, index in zip(requests, indices, strict=True)}
        waiter = self._desk.submit(requests)
        until = self._until() if elsewhere is None else self._until(_ELSEWHERE_SECONDS)
        try:
            async with asyncio.TaskGroup() as group:
                while index_of:
                    by_rank: dict[int, list[Dispatch]] = {}
                    try:
                        found = await waiter.take(until)
                    except QueueTimeout:
                        if elsewhere is None:
                            raise
                        self._desk.withdraw(waiter)
                        rest = list(index_of.values())
                        group.create_task(self._pieces(plan, rest, context, answers, attempt, trial, anywhere=True))
                        break
                    for dispatch in found:
                        by_rank.setdefault(dispatch.rank, []).append(dispatch)
                    for taken in by_rank.values():
                        part = [index_of.pop(dispatch.rid) for dispatch in taken]
                        group.create_task(self._piece(plan, taken, part, context, answers, attempt, trial))
        finally:
            self._desk.withdraw(waiter)
            # A piece that was cancelled before its first step could not do this itself.
            self._desk.abandon([request.rid for request in requests])

    async def _piece(
        self,
        plan: Plan,
        taken: list[Dispatch],
        indices: Sequence[int],
        context: Context,
        answers: list[Any],
        attempt: int,
        before: Trial,
    ) -> None:
        outcome: Exception
        # Pieces have different prompts, so each is judged by itself from where it was cut.
        trial = before.copy()
        try:
            reply, found, again = await self._send(plan, taken, indices, context, trial)
            if found is not None:
                for index, answer in zip(indices, found, strict=True):
                    answers[index] = answer
                return
            outcome = _Final(reply)
        except _Lost as lost:
            again, outcome = lost.again, lost.error
        if not again or not await self._again(plan, attempt):
            raise outcome
        await self._pieces(plan, indices, context, answers, attempt + 1, trial)

    # Steps

    def _requests(self, plan: Plan, indices: Sequence[int], context: Context, elsewhere: int | None) -> list[Request]:
        now = self._desk.now()
        pinned = elsewhere if plan.pinned is None else self._rank_for(plan.pinned)
        requests = []
        for index in indices:
            prompt = plan.prompts[index]
            rid = f"{context.ident}#{next(self._numbers)}"
            requests.append(
                Request(
                    rid,
                    prompt.token_ids,
                    now,
                    logits=prompt.logits,
                    priority=plan.priority,
                    pinned=pinned,
                    namespace=plan.namespace,
                    client=context.client,
                    flow=context.ident if len(plan.prompts) > 1 else "",
                    company=len(plan.prompts),
                )
            )
        return requests

    def _rank_for(self, dp_rank: int) -> int:
        """Of the ranks with this number behind the workers that accept, the one with the least to do."""
        fitting = [rank for rank, (worker, dp) in self._fleet.by_rank.items() if dp == dp_rank and worker.accepting]
        if not fitting:
            raise BadRequest(f"routed_dp_rank {dp_rank}: no worker has that rank")
        return min(fitting, key=self._desk.policy.outstanding)

    def _elsewhere(self, plan: Plan, trial: Trial) -> int | None:
        """Of the ranks behind workers where the request has not failed, the one with the least to do; None if there
        is none, or the request may go anywhere, or it names its rank."""
        if not trial.failed or plan.pinned is not None:
            return None
        fitting = [
            rank
            for rank, (worker, _) in self._fleet.by_rank.items()
            if worker.accepting and worker.id not in trial.failed
        ]
        return min(fitting, key=self._desk.policy.outstanding, default=None)

    def _until(self, most: float = float("inf")) -> float:
        return self._desk.now() + min(self._patience, most)

    async def _again(self, plan: Plan, attempt: int) -> bool:
        """Wait before the next attempt; False if there is none."""
        delay = self._retry.delay(attempt, random.random())
        if delay is None:
            self._metrics.exhausted.labels(plan.path).inc()
            return False
        self._metrics.retries.labels(plan.path).inc()
        await asyncio.sleep(delay)
        return True

    async def _send(
        self, plan: Plan, taken: list[Dispatch], indices: Sequence[int], context: Context, trial: Trial
    ) -> tuple[Reply, list[Any] | None, bool]:
        """One exchange with one rank: the reply, if it is 200 the answers in it, and whether to try again.

        Books the outcome. Raises `_Lost` where there is no reply.
        """
        rank = taken[0].rank
        rids = [dispatch.rid for dispatch in taken]
        settled = False
        try:
            worker, body, headers = self._addressed(plan, rank, indices, context)
            try:
                async with exchange(
                    self._session, self._fleet, worker, plan.path, body, headers, self._seconds
                ) as response:
                    reply = Reply(response.status, await response.read(), _passed_on(response))
                self._count(worker, reply.status)
                _check_key(reply, worker)
                answers = None
                if reply.status == 200:
                    answers = _read(plan, reply, len(indices), worker)
            except (WorkerUnreachable, WorkerTimeout) as error:
                raise _Lost(error, self._judge(trial, worker, error.outcome, str(error))) from error
            again = self._judge(trial, worker, outcome_of(reply.status, reply.body), f"status {reply.status}")
            if answers is None:
                return reply, None, again
            if plan.joined:
                cached = {
                    rid: _cached_of(answer) if plan.prompts[index].exact else None
                    for rid, answer, index in zip(rids, answers, indices, strict=True)
                }
            else:
                cached = {rids[0]: cached_tokens(reply.body) if plan.prompts[0].exact else None}
            settled = True
            self._desk.settle(rank, cached)
            return reply, answers, False
        finally:
            if not settled:
                self._desk.abandon(rids)

    async def _send_stream(
        self, plan: Plan, dispatch: Dispatch, context: Context, sink: Sink, trial: Trial
    ) -> tuple[Reply | None, bool]:
        """As `_send`; the body goes to `sink` as it comes, and from then on nothing is tried again."""
        settled = False
        try:
            worker, body, headers = self._addressed(plan, dispatch.rank, (0,), context)
            begun = False
            try:
                async with exchange(
                    self._session, self._fleet, worker, plan.path, body, headers, self._seconds
                ) as response:
                    self._count(worker, response.status)
                    if response.status != 200:
                        reply = Reply(response.status, await response.read(), _passed_on(response))
                        _check_key(reply, worker)
                    else:
                        begun = True
                        await sink(response)
            except (WorkerUnreachable, WorkerTimeout) as error:
                again = self._judge(trial, worker, error.outcome, str(error))
                if begun:
                    raise StreamBroken(str(error)) from error
                raise _Lost(error, again) from error
            if not begun:
                again = self._judge(trial, worker, outcome_of(reply.status, reply.body), f"status {reply.status}")
                return reply, again
            self._judge(trial, worker, Outcome.ANSWERED, "")
            settled = True
            self._desk.settle(dispatch.rank, {dispatch.rid: None})
            return None, False
        finally:
            if not settled:
                self._desk.abandon([dispatch.rid])

    def _addressed(
        self, plan: Plan, rank: int, indices: Sequence[int], context: Context
    ) -> tuple[Worker, bytes, dict[str, str]]:
        worker, dp_rank = self._fleet.by_rank[rank]
        body = plan.body(indices, dp_rank if len(worker.ranks) > 1 else None)
        return worker, body, {**context.headers, **worker.headers()}

    def _count(self, worker: Worker, status: int) -> None:
        worker.heard(self._desk.now())
        self._metrics.upstream.labels(worker.url, str(status)).inc()

    def _judge(self, trial: Trial, worker: Worker, outcome: Outcome, reason: str) -> bool:
        """Book on workers what follows from an attempt's outcome; whether the request may be tried again."""
        finding = trial.record(worker.id, outcome)
        if finding.succeeded is not None:
            self._fleet.succeeded(worker)
        for ident in finding.blamed:
            # What was said of a worker that failed earlier is its last error already.
            self._fleet.failed(ident, reason if ident == worker.id else "")
        for ident in finding.questioned:
            self._fleet.question(ident, reason if ident == worker.id else "")
        return finding.again


_JSON = {"Content-Type": "application/json"}
_PASSED_ON = ("Content-Type", "Retry-After")


def _passed_on(response: aiohttp.ClientResponse) -> dict[str, str]:
    headers = response.headers
    return {name: headers[name] for name in _PASSED_ON if name in headers}


def _check_key(reply: Reply, worker: Worker) -> None:
    """The client's key was good: what the worker does not take is the router's."""
    if reply.status == HTTPStatus.UNAUTHORIZED:
        raise WorkerUnreachable(
            f"worker {worker.url} does not take the router's key (--worker-api-key, or api_key of PUT /workers/ID)",
            Outcome.UNAVAILABLE,
        )


def _read(plan: Plan, reply: Reply, count: int, worker: Worker) -> list[Any]:
    """The answers in a reply. Raises `WorkerUnreachable` if they are not there."""
    if not plan.joined:
        return [reply.body]
    try:
        return plan.read(reply.body, count)
    except ValueError as error:
        raise WorkerUnreachable(f"worker {worker.url}: {error}") from error


def _cached_of(answer: Any) -> int | None:
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    found = meta.get("cached_tokens") if isinstance(meta, dict) else None
    return found if isinstance(found, int) else None


def _first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What ended a group of tasks; an answer of a worker says more than a refusal of ours."""
    leaves: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop(0)
        if isinstance(error, BaseExceptionGroup):
            stack.extend(error.exceptions)
        else:
            leaves.append(error)
    return next((leaf for leaf in leaves if isinstance(leaf, _Final)), leaves[0])
