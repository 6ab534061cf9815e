"""The router put together: policy, desk, fleet, relay, metrics. No HTTP server in here."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from asyncep_router.errors import ConfigError
from asyncep_router.http.admission import Admission
from asyncep_router.http.admission_gate import AdmissionGate
from asyncep_router.http.decisions import log_decision
from asyncep_router.http.desk import Desk
from asyncep_router.http.fleet import Fleet
from asyncep_router.http.metrics import Metrics
from asyncep_router.http.model import load_cost, stand_in
from asyncep_router.http.policies import make_policy
from asyncep_router.http.public import public_name
from asyncep_router.http.relay import Relay
from asyncep_router.http.tokenizer import Tokenizer, choose
from asyncep_router.http.upstream import make_session

if TYPE_CHECKING:
    from asyncep_router.http.options import RouterOptions
    from asyncep_router.http.worker import Worker, WorkerInfo
    from asyncep_router.messages import Dispatch

logger = logging.getLogger("asyncep_router")


class Router:
    """Made inside a running event loop; `close` ends it."""

    def __init__(self, options: RouterOptions) -> None:
        self.options = options
        self.metrics = Metrics(options.prometheus_duration_buckets)
        self.session = make_session()
        self.desk = Desk(make_policy(options, stand_in()), self._decided)
        self.desk.on_latency = self.metrics.decision.observe
        self.fleet = Fleet(options, self.desk, self.session, self.metrics, self._learn)
        unlimited = options.max_concurrent_requests < 0
        self.gate = AdmissionGate(
            Admission(
                None if unlimited else options.max_concurrent_requests,
                options.queue_size,
                options.queue_timeout_secs,
                options.rate_limit_tokens_per_second,
            )
        )
        self.relay = Relay(
            self.desk,
            self.fleet,
            self.session,
            self.metrics,
            options.retry_policy,
            patience=options.queue_timeout_secs,
            seconds=options.request_timeout_secs,
        )
        self.tokenizer: Tokenizer | None = None
        self.cost_source = "stand-in: no worker yet"
        self.model: WorkerInfo | None = None
        self._tokenizing: asyncio.Task[None] | None = None
        self.metrics.watch(lambda: list(self.fleet.workers.values()), self.state)
        for url in options.worker_urls:
            self.fleet.add(url, named=True)

    async def close(self) -> None:
        """End everything. In-flight requests must be over."""
        await self.fleet.close()
        if self._tokenizing is not None:
            self._tokenizing.cancel()
            await asyncio.gather(self._tokenizing, return_exceptions=True)
        await self.session.close()

    @property
    def ready(self) -> bool:
        """Whether any worker takes requests."""
        return any(worker.accepting for worker in self.fleet.workers.values())

    @property
    def plain_scores(self) -> bool:
        """Whether the workers score item by item with a generating model, which the router can do for them."""
        return self.model is not None and self.model.generates and not self.model.multi_item

    def accepting(self) -> list[Worker]:
        """The workers that take requests, those whose answers came last first: they are the likeliest to answer."""
        found = [worker for worker in self.fleet.workers.values() if worker.accepting]
        return sorted(found, key=lambda worker: -worker.heard_at)

    def state(self) -> dict[str, Any]:
        """`GET /router/state`."""
        placement = self.desk.policy.snapshot()
        return {
            "policy": self.options.policy,
            "ready": self.ready,
            "active": self.gate.admission.active,
            "queued": self.gate.admission.waiting,
            "cost_model": public_name(self.cost_source),
            "tokenizer": self.tokenizer.kind if self.tokenizer else "none",
            "workers": [worker.describe() for worker in self.fleet.workers.values()],
            "ranks": [
                {"rank": rank, "worker": worker.url, "dp_rank": dp_rank}
                for rank, (worker, dp_rank) in sorted(self.fleet.by_rank.items())
            ],
            "placement": {**placement, "ranks": {str(rank): entry for rank, entry in placement["ranks"].items()}},
        }

    def _decided(self, dispatch: Dispatch) -> None:
        worker, _ = self.fleet.by_rank[dispatch.rank]
        self.metrics.selection.labels(worker.url, self.options.policy).inc()
        self.metrics.waited.observe(dispatch.waited)
        if self.options.log_decisions:
            policy = self.desk.policy
            threshold = policy.threshold(dispatch.rank)
            log_decision(dispatch, self.fleet, policy.outstanding(dispatch.rank) / threshold if threshold else 0.0)

    async def _learn(self, worker: Worker, info: WorkerInfo) -> None:
        """From the first worker: the model, its cost, its tokenizer. Raises `ConfigError` for another model."""
        if self.model is None:
            path = self.options.model_path or info.model_path
            cost, source = await asyncio.to_thread(load_cost, path)
            if self.model is None:  # two workers may answer at once; the first one back decides
                self.model = info
                self.desk.policy.cost, self.cost_source = cost, source
                self._tokenizing = asyncio.create_task(self._load_tokenizer(worker, info), name="tokenizer")
        if self.model.model_type and info.model_type and self.model.model_type != info.model_type:
            raise ConfigError(f"{worker.url} serves a {info.model_type}, the other workers a {self.model.model_type}")
        if self.model.model_name != info.model_name:
            logger.warning("%s calls its model %s, others %s", worker.url, info.model_name, self.model.model_name)

    async def _load_tokenizer(self, worker: Worker, info: WorkerInfo) -> None:
        """Beside serving: until it is there, text is compared as text."""
        path = self.options.tokenizer_path or info.tokenizer_path or self.options.model_path or info.model_path
        self.tokenizer = await choose(self.options.tokenizer, path, self.session, worker, self.accepting)
        logger.info("tokenizer: %s", self.tokenizer.kind if self.tokenizer else "none, text is compared as text")
