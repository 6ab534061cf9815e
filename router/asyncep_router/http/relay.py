"""A client's request on its way: placed, sent, tried again elsewhere if need be, answered once."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import aiohttp

from asyncep_router.errors import IntegrityError
from asyncep_router.http.errors import BadRequest, Refusal, StreamBroken, WorkerTimeout, WorkerUnreachable
from asyncep_router.http.plans import cached_tokens
from asyncep_router.http.retry import RETRYABLE, WORKER_FAULTS, RetryPolicy
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
    """What every attempt for one client request needs. `headers` go to the worker. `ident` is the request's id."""

    ident: str
    headers: dict[str, str]


class _Final(Exception):
    """Part of a batch got this answer, so the whole batch gets it."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply


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
            await self._pieces(plan, range(len(answers)), context, answers, 0)
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
        while True:
            outcome: Reply | Refusal
            waiter = self._desk.submit(self._requests(plan, (0,), context))
            try:
                (dispatch,) = await waiter.take(self._until())
            finally:
                self._desk.withdraw(waiter)
            try:
                if sink is None:
                    reply, _ = await self._send(plan, [dispatch], (0,), context)
                else:
                    streamed = await self._send_stream(plan, dispatch, context, sink)
                    if streamed is None:
                        return None
                    reply = streamed
                if reply.status not in RETRYABLE:
                    return reply
                outcome = reply
            except (WorkerUnreachable, WorkerTimeout) as error:
                outcome = error
            if not await self._again(plan, attempt):
                if isinstance(outcome, Refusal):
                    raise outcome
                return outcome
            attempt += 1

    # Many prompts

    async def _pieces(
        self, plan: Plan, indices: Sequence[int], context: Context, answers: list[Any], attempt: int
    ) -> None:
        """Place prompts, send what one rank gets at a time as one request, put the answers in their places."""
        requests = self._requests(plan, indices, context)
        index_of = {request.rid: index for request, index in zip(requests, indices, strict=True)}
        waiter = self._desk.submit(requests)
        until = self._until()
        left = len(requests)
        try:
            async with asyncio.TaskGroup() as group:
                while left:
                    by_rank: dict[int, list[Dispatch]] = {}
                    for dispatch in await waiter.take(until):
                        by_rank.setdefault(dispatch.rank, []).append(dispatch)
                    for taken in by_rank.values():
                        left -= len(taken)
                        part = [index_of[dispatch.rid] for dispatch in taken]
                        group.create_task(self._piece(plan, taken, part, context, answers, attempt))
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
    ) -> None:
        outcome: Exception
        try:
            reply, found = await self._send(plan, taken, indices, context)
            if found is not None:
                for index, answer in zip(indices, found, strict=True):
                    answers[index] = answer
                return
            outcome = _Final(reply)
            if reply.status not in RETRYABLE:
                raise outcome
        except (WorkerUnreachable, WorkerTimeout) as error:
            outcome = error
        if not await self._again(plan, attempt):
            raise outcome
        await self._pieces(plan, indices, context, answers, attempt + 1)

    # Steps

    def _requests(self, plan: Plan, indices: Sequence[int], context: Context) -> list[Request]:
        now = self._desk.now()
        pinned = None if plan.pinned is None else self._rank_for(plan.pinned)
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
                )
            )
        return requests

    def _rank_for(self, dp_rank: int) -> int:
        """Of the ranks with this number behind the workers that accept, the one with the least to do."""
        fitting = [rank for rank, (worker, dp) in self._fleet.by_rank.items() if dp == dp_rank and worker.accepting]
        if not fitting:
            raise BadRequest(f"routed_dp_rank {dp_rank}: no worker has that rank")
        return min(fitting, key=self._desk.placement.outstanding)

    def _until(self) -> float:
        return self._desk.now() + self._patience

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
        self, plan: Plan, taken: list[Dispatch], indices: Sequence[int], context: Context
    ) -> tuple[Reply, list[Any] | None]:
        """One exchange with one rank: the reply, and if it is 200 the answers in it. Books the outcome."""
        rank = taken[0].rank
        rids = [dispatch.rid for dispatch in taken]
        settled = False
        try:
            worker, body, headers = self._addressed(plan, rank, indices, context)
            async with exchange(
                self._session, self._fleet, worker, plan.path, body, headers, self._seconds
            ) as response:
                reply = Reply(response.status, await response.read(), _passed_on(response))
            self._judge(worker, reply.status)
            if reply.status != 200:
                return reply, None
            if plan.joined:
                try:
                    answers = plan.read(reply.body, len(indices))
                except ValueError as error:
                    raise WorkerUnreachable(f"worker {worker.url}: {error}") from error
                cached = {
                    rid: _cached_of(answer) if plan.prompts[index].exact else None
                    for rid, answer, index in zip(rids, answers, indices, strict=True)
                }
            else:
                answers = [reply.body]
                cached = {rids[0]: cached_tokens(reply.body) if plan.prompts[0].exact else None}
            settled = True
            self._desk.settle(rank, cached)
            return reply, answers
        finally:
            if not settled:
                self._desk.abandon(rids)

    async def _send_stream(self, plan: Plan, dispatch: Dispatch, context: Context, sink: Sink) -> Reply | None:
        """As `_send`; the body goes to `sink` as it comes, and from then on nothing is tried again."""
        settled = False
        try:
            worker, body, headers = self._addressed(plan, dispatch.rank, (0,), context)
            async with exchange(
                self._session, self._fleet, worker, plan.path, body, headers, self._seconds
            ) as response:
                if response.status != 200:
                    reply = Reply(response.status, await response.read(), _passed_on(response))
                    self._judge(worker, reply.status)
                    return reply
                try:
                    await sink(response)
                except (WorkerTimeout, aiohttp.ClientPayloadError, TimeoutError) as error:
                    raise StreamBroken(str(error)) from error
            self._judge(worker, 200)
            settled = True
            self._desk.settle(dispatch.rank, {dispatch.rid: None})
            return None
        finally:
            if not settled:
                self._desk.abandon([dispatch.rid])

    def _addressed(
        self, plan: Plan, rank: int, indices: Sequence[int], context: Context
    ) -> tuple[Worker, bytes, dict[str, str]]:
        worker, dp_rank = self._fleet.by_rank[rank]
        body = plan.body(indices, dp_rank if len(worker.ranks) > 1 else None)
        headers = context.headers
        if worker.api_key:
            headers = {**headers, "Authorization": f"Bearer {worker.api_key}"}
        return worker, body, headers

    def _judge(self, worker: Worker, status: int) -> None:
        self._metrics.upstream.labels(worker.url, str(status)).inc()
        if status in WORKER_FAULTS:
            self._fleet.failed(worker, f"status {status}")
        else:
            self._fleet.succeeded(worker)


_JSON = {"Content-Type": "application/json"}
_PASSED_ON = ("Content-Type", "Retry-After")


def _passed_on(response: aiohttp.ClientResponse) -> dict[str, str]:
    headers = response.headers
    return {name: headers[name] for name in _PASSED_ON if name in headers}


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
