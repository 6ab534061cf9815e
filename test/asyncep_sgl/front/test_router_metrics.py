"""``/metrics`` of a server whose router does not answer, and in the format that was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from asyncep_router.durations import Durations
from asyncep_sgl.front.router_metrics import RouterCollector, exposition


def silent() -> dict[str, Any]:
    raise TimeoutError("the router did not answer")


def state() -> dict[str, Any]:
    durations = Durations()
    durations.observe(2e-4, 3)
    return {
        "pending": 4,
        "ranks": {"0": {"outstanding_flops": 5, "threshold_flops": 7.0}, "1": {"threshold_flops": 9.0}},
        "alive": [True, False],
        "restarts": [0, 2],
        "submitted": 11,
        "finished": 6,
        "aborted": 1,
        "returned": 0,
        "quarantined": 0,
        "decision_seconds": durations.snapshot(),
    }


def test_a_silent_router_is_told_apart_from_an_idle_one() -> None:
    body, _ = exposition([RouterCollector(silent)], "", sglang=False)
    samples = [line for line in body.decode().splitlines() if not line.startswith("#")]
    assert samples == ["asyncep_router_up 0.0"]


@pytest.mark.parametrize(
    ("accept", "kind"), [("", "text/plain"), ("application/openmetrics-text; version=1.0.0", "application/openmetrics")]
)
def test_figures_come_in_the_format_asked_for(accept: str, kind: str) -> None:
    body, content_type = exposition([RouterCollector(state)], accept, sglang=False)
    assert content_type.startswith(kind)
    lines = body.decode().splitlines()
    for line in (
        "asyncep_router_up 1.0",
        "asyncep_router_pending 4.0",
        'asyncep_router_rank_flops_in_flight{rank="0"} 5.0',
        'asyncep_router_rank_threshold_flops{rank="1"} 9.0',
        'asyncep_router_rank_up{rank="1"} 0.0',
        'asyncep_router_rank_restarts_total{rank="1"} 2.0',
        "asyncep_router_prompts_finished_total 6.0",
        'asyncep_router_decision_seconds_bucket{le="0.0002"} 3.0',
        "asyncep_router_decision_seconds_count 3.0",
    ):
        assert line in lines
