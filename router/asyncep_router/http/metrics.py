"""What Prometheus reads: `smg_*` as sglang_router names it, and `asyncep_router_*` for what that router lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from asyncep_router.durations import DECISION_SECONDS
from asyncep_router.http.breaker import BreakerState
from asyncep_router.http.worker import Phase
from asyncep_router.metrics import placement_families

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncep_router.http.worker import Worker

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_CIRCUIT = {BreakerState.CLOSED: 0, BreakerState.OPEN: 1, BreakerState.HALF_OPEN: 2}


class Metrics:
    """Counters written while serving. Gauges are read from the state when somebody asks."""

    def __init__(self, buckets: Sequence[float] = ()) -> None:
        self.registry = registry = CollectorRegistry()
        bounds = tuple(buckets) or _SECONDS
        self.http_requests = Counter("smg_http_requests", "requests received", ["method", "path"], registry=registry)
        self.http_responses = Counter("smg_http_responses", "answers sent", ["status_code"], registry=registry)
        self.http_duration = Histogram(
            "smg_http_request_duration_seconds", "from head to answer", ["path"], buckets=bounds, registry=registry
        )
        self.rate_limit = Counter("smg_http_rate_limit", "admission", ["decision"], registry=registry)
        self.router_requests = Counter("smg_router_requests", "requests to be placed", ["endpoint"], registry=registry)
        self.router_errors = Counter(
            "smg_router_request_errors", "refused or failed", ["endpoint", "error_type"], registry=registry
        )
        self.upstream = Counter(
            "smg_router_upstream_responses", "workers' answers", ["worker", "status_code"], registry=registry
        )
        self.stage = Histogram(
            "smg_router_stage_duration_seconds", "time by stage", ["stage"], buckets=bounds, registry=registry
        )
        self.selection = Counter("smg_worker_selection", "prompts sent", ["worker", "policy"], registry=registry)
        self.worker_errors = Counter(
            "smg_worker_errors", "failures of workers", ["worker", "error_type"], registry=registry
        )
        self.retries = Counter("smg_worker_retries", "further attempts", ["endpoint"], registry=registry)
        self.exhausted = Counter("smg_worker_retries_exhausted", "no attempt left", ["endpoint"], registry=registry)
        self.health_checks = Counter("smg_worker_health_checks", "checks", ["worker", "result"], registry=registry)
        self.decision = Histogram(
            "asyncep_router_decision_seconds",
            "matching, placing and charging one client request's prompts",
            buckets=DECISION_SECONDS,
            registry=registry,
        )
        self.waited = Histogram("asyncep_router_pending_seconds", "wait for a rank", buckets=bounds, registry=registry)

    def watch(self, workers: Callable[[], Sequence[Worker]], state: Callable[[], dict[str, Any]]) -> None:
        """Read gauges from these from now on; `state` as `/router/state` gives it."""
        self.registry.register(_Gauges(workers, state))

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)


class _Gauges:
    """A prometheus_client collector."""

    def __init__(self, workers: Callable[[], Sequence[Worker]], state: Callable[[], dict[str, Any]]) -> None:
        self._workers = workers
        self._state = state

    def collect(self) -> Iterator[Metric]:
        workers = list(self._workers())
        yield GaugeMetricFamily("smg_worker_pool_size", "workers known", value=len(workers))
        active = GaugeMetricFamily("smg_worker_requests_active", "requests in flight", labels=["worker"])
        health = GaugeMetricFamily("smg_worker_health", "1 if it takes requests", labels=["worker"])
        circuit = GaugeMetricFamily("smg_worker_cb_state", "0 closed, 1 open, 2 half-open", labels=["worker"])
        failures = GaugeMetricFamily("smg_worker_cb_consecutive_failures", "in a row", labels=["worker"])
        moves = CounterMetricFamily("smg_worker_cb_transitions", "changes", labels=["worker", "from", "to"])
        for worker in workers:
            active.add_metric([worker.url], worker.active)
            health.add_metric([worker.url], float(worker.phase is Phase.READY))
            circuit.add_metric([worker.url], _CIRCUIT[worker.breaker.state])
            failures.add_metric([worker.url], worker.breaker.consecutive_failures)
            for (before, after), count in worker.breaker.transitions.items():
                moves.add_metric([worker.url, before.value, after.value], count)
        yield from (active, health, circuit, failures, moves)
        yield from self._placement()

    def _placement(self) -> Iterator[Metric]:
        state = self._state()
        router = state["placement"]
        yield GaugeMetricFamily("smg_http_connections_active", "requests being answered", value=state["active"])
        yield GaugeMetricFamily("asyncep_router_queue_depth", "requests waiting to be admitted", value=state["queued"])
        places = {str(entry["rank"]): [entry["worker"], str(entry["dp_rank"])] for entry in state["ranks"]}
        yield from placement_families(router, ["worker", "dp_rank"], places)
