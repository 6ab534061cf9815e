"""A frontend's snapshot for Prometheus: the families that both faces of the router publish, under the same names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "tokens of prompts sent"),
    ("cached_tokens", "prefix_hit_tokens", "tokens of them expected in, or reported from, the ranks' caches"),
    ("charged_flops", "charged_flops", "FLOPs charged, net of prefixes"),
    ("saved_flops", "redundant_flops_avoided", "FLOPs that cached prefixes saved"),
)
_RANK_GAUGES = (
    ("outstanding_flops", "rank_flops_in_flight", "FLOPs in flight"),
    ("threshold_flops", "rank_threshold_flops", "T: FLOPs that saturate it"),
    ("requests_in_flight", "rank_requests_in_flight", "prompts in flight"),
    ("view_tokens", "rank_view_tokens", "tokens it is thought to hold"),
)


def histogram(name: str, text: str, durations: Mapping[str, Any]) -> HistogramMetricFamily:
    """A family from `Durations.snapshot`, as JSON may have carried it."""
    bounds = [*(str(float(bound)) for bound in durations["bounds"]), "+Inf"]
    buckets = list(zip(bounds, durations["cumulative"], strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=durations["sum"])


def placement_families(
    snapshot: Mapping[str, Any], labels: Sequence[str], places: Mapping[str, Sequence[str]]
) -> Iterator[Metric]:
    """Families from `RoutingPolicy.snapshot` (or what another policy has of it).

    `labels`: names of the labels of a rank. `places`: by the rank's number as a string, their values; a rank that is
    not in there is left out.
    """
    yield GaugeMetricFamily("asyncep_router_pending", "prompts waiting for a rank", value=snapshot["pending"])
    for key, name, text in _COUNTERS:
        if key in snapshot:
            yield CounterMetricFamily(f"asyncep_router_{name}", text, value=snapshot[key])
    reasons = CounterMetricFamily("asyncep_router_decisions", "prompts sent, by reason", labels=["reason"])
    for reason, count in snapshot.get("reasons", {}).items():
        reasons.add_metric([reason], count)
    yield reasons
    for key, name, text in _RANK_GAUGES:
        gauge = GaugeMetricFamily(f"asyncep_router_{name}", text, labels=labels)
        for rank, entry in snapshot["ranks"].items():
            if str(rank) in places and key in entry:
                gauge.add_metric(places[str(rank)], entry[key])
        yield gauge
