"""``/metrics`` of a server: the router inside it, and SGLang's own figures where it was asked for them.

To be imported when the first question comes and no sooner: prometheus_client decides at its import whether it counts
for this process alone, and SGLang's multiprocess mode has to be set up by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from asyncep_router.metrics import histogram, placement_families


class RouterCollector(Collector):
    """A prometheus_client collector that asks the router each time it is asked.

    Nothing is stored in this process, so it takes no part in prometheus_client's multiprocess mode, in which SGLang
    serves its metrics.
    """

    def __init__(self, state: Callable[[], dict[str, Any]]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """The router's families; only ``asyncep_router_up 0`` if it does not answer."""
        try:
            state = self._state()
        except TimeoutError:
            yield GaugeMetricFamily("asyncep_router_up", "1 if the router answers", value=0)
            return
        yield GaugeMetricFamily("asyncep_router_up", "1 if the router answers", value=1)
        places = {rank: [rank] for rank in state["ranks"]}
        yield from placement_families(state, ["rank"], places)
        alive = GaugeMetricFamily("asyncep_router_rank_up", "1 if the rank runs", labels=["rank"])
        restarts = CounterMetricFamily("asyncep_router_rank_restarts", "times it was started again", labels=["rank"])
        for rank, place in places.items():
            alive.add_metric(place, float(state["alive"][int(rank)]))
            restarts.add_metric(place, state["restarts"][int(rank)])
        yield from (alive, restarts)
        for key, text in (
            ("submitted", "prompts received"),
            ("finished", "prompts whose batch was reported"),
            ("aborted", "prompts withdrawn by their client"),
            ("returned", "prompts that a rank lost and another got"),
            ("quarantined", "prompts that were on a rank both times it died"),
        ):
            yield CounterMetricFamily(f"asyncep_router_prompts_{key}", text, value=state[key])
        yield histogram(
            "asyncep_router_decision_seconds", "matching, placing and charging a prompt", state["decision_seconds"]
        )


def exposition(collectors: Iterable[Collector], accept: str, *, sglang: bool) -> tuple[bytes, str]:
    """The answer to ``GET /metrics`` and its content type. Blocks while the collectors ask.

    Args:
        collectors: of our own figures.
        accept: the request's header; OpenMetrics is spoken to those who ask for it.
        sglang: SGLang runs with ``--enable-metrics``; its figures come along.
    """
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    if sglang:
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # upstream is untyped
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type
