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
from asyncep_router.http.probe import ProbeError, ask, discover
from asyncep_router.http.worker import Phase, Worker, WorkerInfo

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
        self.workers: dict[str, Worker] = {}
        self.by_rank: dict[int, tuple[Worker, int]] = {}
        """(worker, its data-parallel rank) for each of the placement's ranks."""
        self._refuse_if_hopeless()

    # Adding and removing

    def add(self, url: str, api_key: str | None = None, labels: dict[str, str] | None = None) -> Worker:
        """Take in a worker; it serves once it answers. Raises `Conflict`, `ConfigError` (not a URL)."""
        url = normalize(url)
        if any(worker.url == url for worker in self.workers.values()):
            raise Conflict(f"{url} is a worker already")
        worker = Worker(url, Breaker(self._options.breaker_settings), api_key or self._options.api_key, labels or {})
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
        tasks = [*self._tasks.values(), *self._removals]
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

    def failed(self, worker: Worker, error: str) -> None:
        """It answered with an error of its own, or not in time."""
        worker.last_error = error
        self._metrics.worker_errors.labels(worker.url, "fault").inc()
        self._record(worker, False)

    def unreachable(self, worker: Worker, error: str) -> None:
        """A connection to it failed. It gets no more requests until it answers a check, which is made at once."""
        worker.last_error = error
        self._metrics.worker_errors.labels(worker.url, "connection").inc()
        if worker.phase is Phase.READY:
            logger.warning("worker %s: %s; checking", worker.url, error)
            worker.phase = Phase.SUSPECT
            worker.check_now.set()
        self._record(worker, False)

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
        try:
            seconds = options.health_check_timeout_secs
            status, _ = await ask(self._session, worker.url, options.health_check_endpoint, worker.api_key, seconds)
            if status != 200:
                raise ProbeError(f"{options.health_check_endpoint}: status {status}")
            if worker.phase is not Phase.READY and (worker.info is None or worker.died):
                info = await discover(self._session, worker.url, worker.api_key, seconds)
                await self._learn(worker, info)
                await self._join(worker, info)
        except (ProbeError, ConfigError) as error:
            self._metrics.health_checks.labels(worker.url, "failure").inc()
            worker.last_error = str(error)
            worker.successes = 0
            worker.failures += 1
            # Refused or reset, as opposed to slow: the process is gone, and its cache with it.
            worker.died = worker.died or not isinstance(error.__cause__, TimeoutError)
            if worker.failures >= options.health_failure_threshold and worker.phase in (Phase.READY, Phase.SUSPECT):
                logger.warning("worker %s is unhealthy: %s", worker.url, error)
                worker.phase = Phase.UNHEALTHY
                worker.let_go()
                self._update(worker)
            return False
        self._metrics.health_checks.labels(worker.url, "success").inc()
        worker.failures = 0
        worker.successes += 1
        enough = worker.phase is not Phase.UNHEALTHY or worker.successes >= options.health_success_threshold
        if worker.phase is not Phase.READY and enough:
            logger.info("worker %s is ready: %d ranks", worker.url, len(worker.ranks))
            worker.phase = Phase.READY
            self._update(worker)
        return True

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
            self._desk.placement.join(rank, threshold, info.cache_tokens, info.caches, info.gathers)
            ranks.append(rank)
        worker.ranks = tuple(ranks)

    def _threshold(self, info: WorkerInfo) -> float:
        """T of each of its ranks, FLOPs of a whole pass."""
        cost = self._desk.placement.cost
        if self._options.threshold_tokens:
            return float(self._options.threshold_tokens * cost.linear_flops_per_token)
        if info.layer_threshold:
            return cost.threshold_flops(info.layer_threshold)
        return float((info.chunk_tokens or DEFAULT_THRESHOLD_TOKENS) * cost.linear_flops_per_token)

    def _leave(self, worker: Worker) -> None:
        for rank in worker.ranks:
            self._desk.placement.leave(rank)
            del self.by_rank[rank]
        worker.ranks = ()

    def _update(self, worker: Worker) -> None:
        trial = worker.breaker.state is BreakerState.HALF_OPEN
        for rank in worker.ranks:
            self._desk.placement.accept(rank, worker.accepting, trial)
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


def normalize(url: str) -> str:
    """The form in which workers are compared. Raises `ConfigError`."""
    url = url.strip().rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    if not url.startswith(("http://", "https://")) or not url.split("://", 1)[1]:
        raise ConfigError(f"worker URL {url!r}: must be http://HOST:PORT")
    return url
