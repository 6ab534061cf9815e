"""The figures both faces publish: what Prometheus reads of a histogram and a snapshot."""

from __future__ import annotations

import json
from array import array

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from small_moe import COST

from asyncep_router.block_view import BlockView
from asyncep_router.config import Limits
from asyncep_router.durations import Durations
from asyncep_router.messages import BatchReport, Request
from asyncep_router.metrics import histogram, placement_families
from asyncep_router.routing_policy import RoutingPolicy


def read(*families: object) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Samples as a Prometheus server would read them, by name and labels."""

    class Collector:
        def collect(self) -> tuple[object, ...]:
            return families

    registry = CollectorRegistry()
    registry.register(Collector())  # type: ignore[arg-type]
    text = generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_histogram_counts_what_it_saw_also_by_way_of_json() -> None:
    durations = Durations((0.1, 1.0))
    for seconds, times in ((0.05, 1), (0.1, 2), (0.5, 3), (7.0, 1)):
        durations.observe(seconds, times)
    samples = read(histogram("x_seconds", "x", json.loads(json.dumps(durations.snapshot()))))
    assert samples["x_seconds_bucket", (("le", "0.1"),)] == 3
    assert samples["x_seconds_bucket", (("le", "1.0"),)] == 6
    assert samples["x_seconds_bucket", (("le", "+Inf"),)] == samples["x_seconds_count", ()] == 7
    assert samples["x_seconds_sum", ()] == 0.05 + 0.2 + 1.5 + 7.0


def test_a_frontends_families_are_its_books() -> None:
    front = RoutingPolicy(COST, BlockView(10**6, 16), Limits(block=16, default_threshold=COST.flops(4000)))
    for rank in range(2):
        front.rank_joined(rank)
    for i in range(3):
        front.submit(Request(f"r{i}", array("q", [7] * 640 + [i] * 16), 0.0), 0.0)
    (first,) = front.poll(0.0)
    front.report(BatchReport(first.rank, (first.rid,)), 1.0)
    rest = front.poll(1.0)
    front.submit(Request("later", array("q", [9] * 5000), 1.0, pinned=1), 1.0)
    samples = read(*placement_families(front.snapshot(), ["rank"], {"0": ["0"], "1": ["1"]}))
    on = (("rank", str(first.rank)),)
    assert samples["asyncep_router_pending", ()] == 1
    assert samples["asyncep_router_prefix_hit_tokens_total", ()] == 2 * 640
    assert samples["asyncep_router_prompt_tokens_total", ()] == 3 * 656
    assert samples["asyncep_router_redundant_flops_avoided_total", ()] == 2 * (COST.flops(656) - COST.flops(16, 640))
    assert samples["asyncep_router_rank_flops_in_flight", on] == sum(d.flops for d in rest)
    assert samples["asyncep_router_rank_threshold_flops", on] == COST.flops(4000)
    assert samples["asyncep_router_rank_requests_in_flight", on] == 2
    assert samples["asyncep_router_decisions_total", (("reason", "longest_prefix"),)] == 2
