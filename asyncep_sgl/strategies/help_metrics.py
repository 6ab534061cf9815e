"""``/metrics`` of help among ranks. To be imported as late as `router_metrics`, for the same reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from asyncep_sgl.experts.store.messages import Status

_COUNTERS = (
    ("blocks", "asyncep_help_offered_blocks", "blocks of experts and attention that a rank offered to idle ranks"),
    ("helped", "asyncep_help_helped_blocks", "of these, computed by other ranks"),
    ("left", "asyncep_help_left_offers", "offers whose helper did not come out in time"),
)


class HelpCollector(Collector):
    """A prometheus_client collector over the launcher's books."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """One sample a rank."""
        reports = self._status().help
        for key, name, text in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["rank"])
            for report in reports:
                counter.add_metric([str(report.rank)], getattr(report, key))
            yield counter
