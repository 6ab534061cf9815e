"""``/metrics`` of the ranks' gathers. To be imported as late as `router_metrics`, for the same reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from asyncep_sgl.experts.store.messages import GatherReport

_GAUGES = (
    ("seconds", "asyncep_gather_seconds", "t_EP: time of one layer's gather"),
    ("bytes_per_layer", "asyncep_gather_layer_bytes", "bytes of the largest layer's gather"),
    ("window_fixed", "asyncep_gather_window_fixed_seconds", "compute window of a layer, the part all batches have"),
    ("window_per_flop", "asyncep_gather_window_seconds_per_flop", "what each FLOP of a layer adds to it"),
    ("saturation_flops", "asyncep_gather_saturation_flops", "FLOPs of a layer that just hide a gather"),
    ("threshold_flops", "asyncep_gather_threshold_flops", "T: the same with its margin"),
    ("peak_threshold_flops", "asyncep_gather_peak_threshold_flops", "T after the paper: t_EP, the peak and the margin"),
    ("gemm_flops_per_second", "asyncep_gather_peak_flops_per_second", "measured peak of the rank"),
)
_COUNTERS = (
    ("batches", "asyncep_gather_batches", "batches computed with gathered experts"),
    ("exposed_seconds", "asyncep_gather_exposed_seconds", "time compute stood still for weights"),
    ("step_seconds", "asyncep_gather_step_seconds", "time of those batches"),
    ("digest_failures", "asyncep_gather_digest_failures", "experts that came wrong and were gathered again"),
    ("peer_losses", "asyncep_gather_peer_losses", "transfers that broke off"),
)


class GatherCollector(Collector):
    """A prometheus_client collector over the ranks' reports."""

    def __init__(self, reports: Callable[[], Sequence[GatherReport]]) -> None:
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        """One sample a rank in each family; none of what a rank does not know yet."""
        reports = self._reports()
        for key, name, text in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["rank"])
            for report in reports:
                value = getattr(report, key)
                if value is not None:
                    gauge.add_metric([str(report.rank)], value)
            yield gauge
        for key, name, text in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["rank"])
            for report in reports:
                counter.add_metric([str(report.rank)], getattr(report, key))
            yield counter
