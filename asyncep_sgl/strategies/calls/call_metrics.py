"""``/metrics`` of expert calls. To be imported as late as `router_metrics`, for the same reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from asyncep_sgl.experts.store.messages import Status

_OF_RANKS = (
    ("sent", "asyncep_calls_sent", "expert calls sent to other hosts"),
    ("rows", "asyncep_calls_rows", "rows in them"),
    ("late", "asyncep_calls_late", "calls not answered in time; their experts were fetched"),
    ("declined", "asyncep_calls_declined", "calls declined or answered wrong; their experts were fetched"),
    ("digest_failures", "asyncep_calls_digest_failures", "answers that came otherwise than they were sent"),
    ("fetched_rows", "asyncep_calls_fetched_rows", "rows whose experts were fetched"),
    ("wait_seconds", "asyncep_calls_wait_seconds", "time a rank stood still for rows"),
    ("step_seconds", "asyncep_calls_step_seconds", "time of its batches"),
)
_OF_WORKER = (
    ("calls", "asyncep_served_calls", "expert calls of other hosts that the worker has answered"),
    ("rows", "asyncep_served_rows", "rows in them"),
    ("runs", "asyncep_served_runs", "computations, each of one call or of several"),
    ("declined", "asyncep_served_declined", "calls that could not be computed"),
    ("dropped", "asyncep_served_dropped", "calls that nobody waited for any more"),
    ("queue_seconds", "asyncep_served_queue_seconds", "sum over calls of the time each stood in the queue"),
    ("busy_seconds", "asyncep_served_busy_seconds", "time the worker computed"),
)


class CallCollector(Collector):
    """A prometheus_client collector over the launcher's books."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """One sample a rank, and one for the worker."""
        status = self._status()
        for key, name, text in _OF_RANKS:
            counter = CounterMetricFamily(name, text, labels=["rank"])
            for report in status.calls:
                counter.add_metric([str(report.rank)], getattr(report, key))
            yield counter
        for key, name, text in _OF_WORKER:
            counter = CounterMetricFamily(name, text)
            if status.served is not None:
                counter.add_metric([], getattr(status.served, key))
            yield counter
