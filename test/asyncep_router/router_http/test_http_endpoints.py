"""Endpoints, keys, ids, batches, streams and metrics, in front of null workers."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx

from router_http.harness import NullWorker, RouterProcess

Workers = Callable[..., NullWorker]
Routers = Callable[..., RouterProcess]


def test_batch_is_split_over_ranks_and_merged_in_order(null_worker: Workers, router: Routers) -> None:
    worker = null_worker(ranks=2)
    process = router(worker.url, flags="--threshold-tokens 500 --log-decisions").ready(1)
    prompts = [[number] * 100 for number in range(40)]
    answers = process.post("/generate", {"input_ids": prompts}).json()
    assert [answer["meta_info"]["sum"] for answer in answers] == [100 * number for number in range(40)]
    counts = worker.counts
    assert set(counts["by_rank"]) == {"0", "1"}  # every prompt named its rank
    assert counts["seen"] < 40  # and those of one rank travelled together
    lines = [json.loads(line) for line in process.log.read_text().splitlines() if line.startswith("{")]
    assert len(lines) == 40
    assert {"request_id", "worker", "dp_rank", "reason", "flops", "cached_tokens"} <= set(lines[0])


def test_stream_is_passed_through(null_worker: Workers, router: Routers) -> None:
    process = router(null_worker().url).ready(1)
    answer = process.post("/generate", {"input_ids": [1, 2], "stream": True})
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.text.count('"sum":3') == 2
    assert answer.text.endswith("data: [DONE]\n\n")


def test_key_guards_everything_but_health(null_worker: Workers, router: Routers) -> None:
    process = router(null_worker().url, flags="--api-key secret")
    key = {"Authorization": "Bearer secret"}
    process.state = lambda: httpx.get(process.url + "/router/state", headers=key).json()  # type: ignore[method-assign]
    process.ready(1)
    assert httpx.get(process.url + "/health").status_code == 200
    for method, path in (
        ("POST", "/generate"),
        ("GET", "/workers"),
        ("GET", "/router/state"),
        ("POST", "/flush_cache"),
    ):
        answer = httpx.request(method, process.url + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
    assert process.post("/generate", {"input_ids": [1]}, headers=key).status_code == 200


def test_ids_origins_sizes_and_errors(null_worker: Workers, router: Routers) -> None:
    flags = "--cors-allowed-origins http://here --max-payload-size 1000 --request-id-headers x-mine"
    process = router(null_worker().url, flags=flags).ready(1)
    answer = process.post("/generate", {"input_ids": [1]}, headers={"x-mine": "me", "Origin": "http://here"})
    assert answer.headers["x-request-id"] == "me"
    assert answer.headers["access-control-allow-origin"] == "http://here"
    assert process.post("/generate", {"input_ids": [1] * 1000}).json()["error"]["code"] == "payload_too_large"
    broken = httpx.post(process.url + "/generate", content=b"{")
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "bad_request")
    assert process.post("/generate", {"input_ids": [1], "routed_dp_rank": 7}).status_code == 400
    assert process.post("/nowhere", {}).json()["error"]["code"] == "not_found"
    assert httpx.get(process.url + "/v1/models").status_code == 200
    assert httpx.get(process.url + "/get_loads").json()["pending"] == 0
    assert process.post("/flush_cache", {}).status_code == 200


def test_metrics_tell_of_hits_and_reasons(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    process = router(worker.url).ready(1)
    for _ in range(3):
        process.post("/generate", {"input_ids": list(range(300))})
    metrics = process.metrics()
    assert metrics["smg_worker_pool_size"] == 1
    assert metrics[f'smg_worker_health{{worker="{worker.url}"}}'] == 1
    assert metrics["asyncep_router_prompt_tokens_total"] == 900
    assert metrics["asyncep_router_prefix_hit_tokens_total"] == 2 * 256
    assert metrics["asyncep_router_redundant_flops_avoided_total"] > 0
    assert metrics['asyncep_router_decisions_total{reason="longest_prefix"}'] == 2
    assert metrics["asyncep_router_decision_seconds_count"] == 3
    assert metrics[f'asyncep_router_rank_threshold_flops{{dp_rank="0",worker="{worker.url}"}}'] > 0


def test_every_policy_serves(null_worker: Workers, router: Routers) -> None:
    workers = [null_worker(), null_worker()]
    for policy in ("cache_aware", "round_robin", "random", "power_of_two"):
        process = router(*(worker.url for worker in workers), flags=f"--policy {policy}").ready(2)
        answers = process.post("/generate", {"input_ids": [[number] * 10 for number in range(20)]}).json()
        assert [answer["meta_info"]["sum"] for answer in answers] == [10 * number for number in range(20)]
        process.stop()
