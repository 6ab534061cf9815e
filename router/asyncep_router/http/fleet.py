"""The workers: adding, finding out what they are, checking, suspecting, draining, removing.

One task for each worker watches it. Whatever changes goes through `_update`, the one place that tells the
placement which ranks may take work.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from asyncep_router.errors import ConfigError
from asyncep_router.http.breaker import Breaker, BreakerState
from asyncep_router.http.errors import Conflict, NotFound, NoWorker
from asyncep_router.http.model import DEFAULT_THRESHOLD_TOKENS
from asyncep_router.http.probe import Answer, ProbeError, ask, discover, prove, question
from asyncep_router.http.worker import Phase, Worker, WorkerInfo
from asyncep_router.http.worker_urls import normalize, worker_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import aiohttp

    from asyncep_router.http.desk import Desk
    from asyncep_router.http.metrics import Metrics
    from asyncep_router.http.options import RouterOptions

logger = logging.getLogger("asyncep_router")

# A worker that just failed is looked at again after this many seconds, then in growing intervals.
_FIRST_LOOK = 0.2
_LOOK_GROWTH = 1.5
# A worker is asked a question of the router's own at most every so many seconds, and may take so many to answer it: a
# request's time, but neither so little that a moment in which this process stands still counts, nor for ever.
_QUESTION_PAUSE = 0.5
_QUESTION_SECONDS = (10.0, 30.0)


class Fleet:
    """`learn` is awaited with every newly found worker before its ranks join: it loads cost and tokenizer."""

    def __init__(
        self,
        options: RouterOptions,
        desk: Desk,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        learn: Callable[[Worker, WorkerInfo], Awaitable[None]],
    ) -> None:
        self._options = options
        self._desk = desk
        self._session = session
        self._metrics = metrics
        self._learn = learn
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._removals: set[asyncio.Task[None]] = set()
        self._questions: dict[str, asyncio.Task[None]] = {}
        self.workers: dict[str, Worker] = {}
        self.by_rank: dict[int, tuple[Worker, int]] = {}
        """(worker, its data-parallel rank) for each of the placement's ranks."""
        self._refuse_if_hopeless()

    # Adding and removing

    def add(
        self, url: str, api_key: str | None = None, labels: dict[str, str] | None = None, *, named: bool = False
    ) -> Worker:
        """Take in a worker; it serves once it answers. Raises `Conflict`, `ConfigError` (not a URL, not a key).

        Without a key of its own it gets the router's key for workers only if the operator meant that: it is `named`
        on the command line, or its URL is in `--trusted-worker-urls`.
        """
        url = normalize(url)
        if any(worker.url == url for worker in self.workers.values()):
            raise Conflict(f"{url} is a worker already")
        key, admin_key = worker_key(api_key), None
        if key is None and (named or url in self._options.trusted_urls):
            key, admin_key = self._options.key_for_workers, self._options.worker_admin_api_key
        worker = Worker(url, Breaker(self._options.breaker_settings), key, admin_key, labels or {})
        self.workers[worker.id] = worker
        self._tasks[worker.id] = asyncio.create_task(self._watch(worker), name=f"watch {url}")
        self._refuse_if_hopeless()
        logger.info("worker %s added", url)
        return worker

    def get(self, ident: str) -> Worker:
        """By id or URL. Raises `NotFound`."""
        for worker in self.workers.values():
            if ident in (worker.id, worker.url):
                return worker
        try:
            url = normalize(ident)
        except ConfigError:
            url = ""
        for worker in self.workers.values():
            if worker.url == url:
                return worker
        raise NotFound(f"no worker {ident!r}")

    def remove(self, worker: Worker) -> None:
        """Send it nothing more; once its requests are answered (or the grace period is over) it is forgotten."""
        if worker.phase is Phase.DRAINING:
            return
        task = asyncio.create_task(self._drain(worker), name=f"drain {worker.url}")
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)
        worker.phase = Phase.DRAINING
        self._update(worker)

    async def close(self) -> None:
        """Stop watching. Nothing is in flight any more."""
        tasks = [*self._tasks.values(), *self._removals, *self._questions.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _drain(self, worker: Worker) -> None:
        logger.info("worker %s: draining %d requests", worker.url, worker.active)
        self._tasks.pop(worker.id).cancel()
        try:
            async with asyncio.timeout(self._options.shutdown_grace_period_secs):
                await worker.idle.wait()
        except TimeoutError:
            logger.warning("worker %s: %d requests not answered in time, tried elsewhere", worker.url, worker.active)
            worker.let_go()
            await worker.idle.wait()
        self._leave(worker)
        del self.workers[worker.id]
        self._refuse_if_hopeless()
        logger.info("worker %s removed", worker.url)

    # What happens to requests

    def succeeded(self, worker: Worker) -> None:
        """It answered a request."""
        if worker.breaker.consecutive_failures or worker.breaker.state is not BreakerState.CLOSED:
            self._record(worker, True)

    def failed(self, ident: str, error: str = "") -> None:
        """A worker, by id, failed where another one did not."""
        worker = self.workers.get(ident)
        if worker is None:
            return
        worker.last_error = error or worker.last_error
        if worker.phase is Phase.SUSPECT and worker.outage_booked:
            return
        worker.outage_booked = worker.phase is Phase.SUSPECT
        self._metrics.worker_errors.labels(worker.url, "fault").inc()
        self._record(worker, False)

    def unconnected(self, worker: Worker, error: str) -> None:
        """It cannot be connected to. It gets no more requests until it answers a check, which is made at once."""
        worker.last_error = error
        self._metrics.worker_errors.labels(worker.url, "connection").inc()
        self._suspect(worker)

    def dropped(self, worker: Worker, error: str) -> None:
        """It broke a connection with a request on it: a check made at once tells whether it is gone. Until then it
        keeps serving others, since the request may be what broke the connection."""
        worker.last_error = error
        self._metrics.worker_errors.labels(worker.url, "dropped").inc()
        worker.check_now.set()

    def question(self, ident: str, error: str = "") -> None:
        """Nobody else can tell whether a failure was a worker's fault or the request's, so ask the worker."""
        worker = self.workers.get(ident)
        if worker is None:
            return
        worker.last_error = error or worker.last_error
        now = self._desk.now()
        if ident in self._questions or worker.info is None or now < worker.questioned_at + _QUESTION_PAUSE:
            return
        worker.questioned_at = now
        task = asyncio.create_task(self._question(worker, worker.info), name=f"question {worker.url}")
        self._questions[ident] = task
        task.add_done_callback(lambda _: self._questions.pop(ident, None))

    async def _question(self, worker: Worker, info: WorkerInfo) -> None:
        started = self._desk.now()
        least, most = _QUESTION_SECONDS
        limit = min(most, max(least, self._options.request_timeout_secs))
        answer = await question(self._session, worker, info.generates, limit)
        if worker.id not in self.workers or worker.phase is Phase.DRAINING:
            return
        if answer is Answer.SILENCE and worker.heard_at >= started:
            return  # it waits behind other work, which makes progress
        if answer is Answer.WORKS:
            # It makes no failure undone, so that a worker whose own answers fail elsewhere is still found.
            if worker.breaker.state is BreakerState.HALF_OPEN:
                self._record(worker, True)
        elif answer is not Answer.UNCLEAR:
            self._metrics.worker_errors.labels(worker.url, "question").inc()
            self._record(worker, False)

    def _suspect(self, worker: Worker) -> None:
        if worker.phase is Phase.READY:
            logger.warning("worker %s: %s; checking", worker.url, worker.last_error)
            worker.phase = Phase.SUSPECT
            self._update(worker)
        worker.check_now.set()

    def _record(self, worker: Worker, success: bool) -> None:
        before = worker.breaker.state
        state = worker.breaker.record(success, self._desk.now())
        if state is not before and state is BreakerState.OPEN:
            logger.warning("worker %s: circuit open, last %s", worker.url, worker.last_error)
            at = worker.breaker.next_change()
            if at is not None:
                asyncio.get_running_loop().call_at(at, self._half_open, worker, at)
        self._update(worker)

    def _half_open(self, worker: Worker, at: float) -> None:
        # A clock tick early or late, it is the moment the timer was set for that counts; and only if the
        # circuit was not opened anew since.
        if worker.breaker.next_change() == at and worker.id in self.workers:
            worker.breaker.advance(at)
            self._update(worker)

    # Watching

    async def _watch(self, worker: Worker) -> None:
        options = self._options
        since = self._desk.now()
        overdue = False
        pause = _FIRST_LOOK
        while True:
            healthy = await self._look(worker)
            if worker.phase is Phase.READY:
                pause = _FIRST_LOOK
                wait: float | None = None if options.disable_health_check else options.health_check_interval_secs
            else:
                wait = min(pause, options.worker_startup_check_interval, options.health_check_interval_secs)
                pause = _FIRST_LOOK if healthy else pause * _LOOK_GROWTH
                late = self._desk.now() - since > options.worker_startup_timeout_secs
                if worker.phase is Phase.STARTING and late and not overdue:
                    overdue = True
                    logger.error("worker %s has not answered yet: %s", worker.url, worker.last_error)
            worker.check_now.clear()
            try:
                async with asyncio.timeout(wait):
                    await worker.check_now.wait()
            except TimeoutError:
                pass

    async def _look(self, worker: Worker) -> bool:
        """One check, with its consequences."""
        options = self._options
        started = self._desk.now()
        try:
            seconds = options.health_check_timeout_secs
            if not worker.proven:
                await prove(self._session, worker.url, options.health_check_endpoint, seconds)
                worker.proven = True
            status, _ = await ask(self._session, worker.url, options.health_check_endpoint, worker.headers(), seconds)
            if status != 200:
                raise ProbeError(f"{options.health_check_endpoint}: status {status}")
            if worker.phase is not Phase.READY and (worker.info is None or worker.died):
                info = await discover(self._session, worker.url, worker.headers(), seconds)
                await self._learn(worker, info)
                await self._join(worker, info)
        except (ProbeError, ConfigError) as error:
            return self._looked_bad(worker, error, started)
        self._metrics.health_checks.labels(worker.url, "success").inc()
        worker.failures = 0
        worker.successes += 1
        enough = worker.phase is not Phase.UNHEALTHY or worker.successes >= options.health_success_threshold
        if worker.phase is not Phase.READY and enough:
            logger.info("worker %s is ready: %d ranks", worker.url, len(worker.ranks))
            worker.phase = Phase.READY
            worker.outage_booked = False
            self._update(worker)
        return True

    def _looked_bad(self, worker: Worker, error: ProbeError | ConfigError, started: float) -> bool:
        """A check that began at `started` failed; whether the worker counts as healthy all the same."""
        options = self._options
        slow = isinstance(error, ProbeError) and error.slow
        if slow and worker.phase is Phase.READY and worker.heard_at >= started - options.health_check_timeout_secs:
            # The check queues behind work, and answers to that work come.
            self._metrics.health_checks.labels(worker.url, "busy").inc()
            return True
        self._metrics.health_checks.labels(worker.url, "failure").inc()
        worker.last_error = str(error)
        worker.successes = 0
        worker.failures += 1
        if isinstance(error, ProbeError) and error.gone:
            # The process is gone, and its cache with it; what listens there next has to prove itself.
            worker.died = True
            worker.proven = False
            self._suspect(worker)
        if worker.failures >= options.health_failure_threshold and worker.phase in (Phase.READY, Phase.SUSPECT):
            logger.warning("worker %s is unhealthy: %s", worker.url, error)
            worker.phase = Phase.UNHEALTHY
            worker.let_go()
            self._update(worker)
        return False

    async def _join(self, worker: Worker, info: WorkerInfo) -> None:
        if worker.ranks:  # it comes back from death
            worker.let_go()
            await worker.idle.wait()
            self._leave(worker)
        worker.info = info
        worker.died = False
        threshold = self._threshold(info)
        ranks: list[int] = []
        for dp_rank in range(info.ranks):
            # The lowest free number: rank sets are bits of an integer and should stay short.
            rank = next(number for number in range(len(self.by_rank) + 1) if number not in self.by_rank)
            self.by_rank[rank] = (worker, dp_rank)
            self._desk.policy.rank_joined(
                rank,
                caches=info.caches,
                cache_tokens=info.cache_tokens,
                gathers=info.gathers,
                threshold=threshold,
            )
            self._desk.policy.set_accepting(rank, False)
            ranks.append(rank)
        worker.ranks = tuple(ranks)

    def _threshold(self, info: WorkerInfo) -> float:
        """T of each of its ranks, FLOPs of a whole pass."""
        cost = self._desk.policy.cost
        if self._options.threshold_tokens:
            return float(self._options.threshold_tokens * cost.linear_flops_per_token)
        if info.layer_threshold:
            return cost.threshold_flops(info.layer_threshold)
        return float((info.chunk_tokens or DEFAULT_THRESHOLD_TOKENS) * cost.linear_flops_per_token)

    def _leave(self, worker: Worker) -> None:
        for rank in worker.ranks:
            self._desk.policy.rank_died(rank)
            del self.by_rank[rank]
        worker.ranks = ()

    def _update(self, worker: Worker) -> None:
        trial = worker.breaker.state is BreakerState.HALF_OPEN
        for rank in worker.ranks:
            self._desk.policy.set_accepting(rank, worker.accepting, trial=trial)
        self._refuse_if_hopeless()
        self._desk.pump()

    def _refuse_if_hopeless(self) -> None:
        """Requests wait for workers that start or recover; not for none, nor for open circuits."""
        staying = [worker for worker in self.workers.values() if worker.phase is not Phase.DRAINING]
        if any(worker.breaker.state is not BreakerState.OPEN for worker in staying):
            self._desk.refuse(None)
        else:
            reason = "the circuits of all workers are open" if staying else "there are no workers"
            self._desk.refuse(NoWorker(reason))
