"""The router inside the engine, on real ranks: a killed rank loses nothing, control works, idle costs nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server import Server

from asyncep_router.cost import ModelCost

pytestmark = pytest.mark.server

REQUESTS = 500
LABELS = [3, 17, 101]
NOTHING_NEW = {"max_new_tokens": 0}


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], tiny_model: Callable[[str], Path]) -> Server:
    return serve(tiny_model("qwen3_moe"), "--dtype", "float32", "--chat-template", "chatml")


@pytest.fixture(scope="module")
def lone(serve: Callable[..., Server], tiny_model: Callable[[str], Path]) -> Server:
    """A server with one rank."""
    return serve(tiny_model("qwen3_moe"), "--dtype", "float32", ranks=1)


def prompt(number: int) -> list[int]:
    return [(7 * i + 31 * number) % 500 + 3 for i in range(300)]


@contextlib.contextmanager
def stopped_ranks(server: Server) -> Iterator[None]:
    """Ranks do nothing meanwhile, which is to be shorter than the time after which they count as stuck."""
    ranks = [rank["pid"] for rank in server.status()["ranks"]]
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    try:
        yield
    finally:
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)


def metrics(server: Server) -> dict[str, float]:
    """Samples of ``/metrics`` by name and labels."""
    answer = httpx.get(server.url + "/metrics", timeout=30)
    assert answer.status_code == 200
    samples = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return samples


def router(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(server.url + "/router/state", timeout=30).json()
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def test_work_is_charged_and_settled(server: Server) -> None:
    server.log_probabilities([prompt(i) for i in range(20)], LABELS)
    state = router(server)
    assert state["finished"] == state["submitted"] == state["dispatched"]
    assert state["unknown_reports"] == 0
    for rank in state["ranks"].values():
        assert rank["outstanding_flops"] == 0
        assert rank["settled_flops"] == rank["charged_flops"]


@pytest.mark.parametrize("together", ["in one body", "on 40 connections"])
def test_a_prefix_nobody_holds_is_computed_once_for_all_who_come_together(server: Server, together: str) -> None:
    server.post("/flush_cache", {})
    wait_until(lambda: router(server)["view_tokens"] == 0)
    shared = prompt(1000 + len(together))[:256]
    prompts = [shared + [6 + i] * 20 for i in range(40)]

    def cached(what: str) -> int:
        return sum(rank[f"{what}_cached_tokens"] for rank in router(server)["ranks"].values())

    expected, found = cached("expected"), cached("found")
    if together == "in one body":
        server.log_probabilities(prompts, LABELS)
    else:
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda tokens: server.log_probabilities([tokens], LABELS), prompts))
    # All together are less than one rank may hold: one copy of the prefix, and it is there when they come.
    assert cached("expected") - expected == (len(prompts) - 1) * len(shared)
    assert cached("found") - found == (len(prompts) - 1) * len(shared)


def test_a_single_request_passes_a_long_list_whose_answers_stay_in_order(server: Server) -> None:
    prompts = [prompt(3000 + number)[: 60 + number % 90] for number in range(1500)]
    body = {"input_ids": prompts, "sampling_params": NOTHING_NEW, "rid": "list"}
    # It begins as none of the list does.
    single = {"input_ids": prompt(9000)[::-1], "sampling_params": NOTHING_NEW}
    submitted = "asyncep_router_prompts_submitted_total"
    before = metrics(server)[submitted]

    def ask(what: dict[str, Any]) -> tuple[httpx.Response, float]:
        return server.post("/generate", what, 600), time.monotonic()

    with ThreadPoolExecutor(2) as pool:
        # However fast the machine is, the router has all of the list and the single one before a rank goes on.
        with stopped_ranks(server):
            the_list = pool.submit(ask, body)
            wait_until(lambda: metrics(server)[submitted] - before >= len(prompts))
            assert router(server)["pending_bulk"] > 0
            the_single = pool.submit(ask, single)
            wait_until(lambda: metrics(server)[submitted] - before > len(prompts))
        answer, single_ended = the_single.result()
        assert answer.status_code == 200
        answer, list_ended = the_list.result()
    assert single_ended < list_ended
    found = answer.json()
    assert [each["meta_info"]["prompt_tokens"] for each in found] == [len(tokens) for tokens in prompts]
    assert [each["meta_info"]["id"] for each in found] == [f"list_{number}" for number in range(len(prompts))]


def test_one_bad_prompt_of_a_long_list_refuses_the_list_and_leaves_nothing_behind(server: Server) -> None:
    prompts = [prompt(5000 + number)[:20] for number in range(300)]
    prompts[280] = [-1]
    answer = server.post("/generate", {"input_ids": prompts, "sampling_params": NOTHING_NEW})
    assert answer.status_code == 400
    wait_until(lambda: not router(server)["pending"])
    state = router(server)
    assert all(rank["outstanding_flops"] == 0 for rank in state["ranks"].values())


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_a_priority_above_normal_takes_the_admin_key(server: Server, path: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/generate": {"text": "a", "sampling_params": NOTHING_NEW},
        "/v1/completions": {"model": "default", "prompt": "a", "max_tokens": 0},
        "/v1/chat/completions": {"model": "default", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    }
    answer = server.post(path, {**bodies[path], "priority": 1})
    assert answer.status_code == 400
    assert "--admin-api-key" in answer.text


def test_metrics_count_known_requests(server: Server, tiny_model: Callable[[str], Path]) -> None:
    cost = ModelCost.from_config(json.loads((tiny_model("qwen3_moe") / "config.json").read_text()))
    server.post("/flush_cache", {})
    wait_until(lambda: router(server)["view_tokens"] == 0)
    shared = prompt(2000)[:256]
    before = metrics(server)
    for i in range(5):  # one after another: the first computes what the others find
        body = {"input_ids": shared + [6 + i] * 20, "sampling_params": NOTHING_NEW, "routed_dp_rank": 1}
        assert server.post("/generate", body).status_code == 200
    after = metrics(server)
    gained = {name: value - before.get(name, 0.0) for name, value in after.items()}
    prefix = "asyncep_router_"
    assert gained[prefix + "prompts_submitted_total"] == gained[prefix + "prompts_finished_total"] == 5
    assert gained[prefix + "decisions_total{reason=pinned}"] == 5
    assert gained[prefix + "decision_seconds_count"] == gained[prefix + "decision_seconds_bucket{le=+Inf}"] == 5
    assert gained[prefix + "prompt_tokens_total"] == 5 * 276
    assert gained[prefix + "prefix_hit_tokens_total"] == 4 * 256
    avoided = cost.flops(276) - cost.flops(20, 256)
    assert gained[prefix + "redundant_flops_avoided_total"] == 4 * avoided
    assert gained[prefix + "charged_flops_total"] == 5 * cost.flops(276) - 4 * avoided
    assert after[prefix + "pending"] == 0
    threshold, batch = cost.flops(256), cost.flops(2048)  # nothing is gathered; --asyncep-threshold-tokens
    for rank in (0, 1):
        assert after[f"{prefix}rank_flops_in_flight{{rank={rank}}}"] == 0
        assert after[f"{prefix}rank_threshold_flops{{rank={rank}}}"] == threshold
        assert after[f"{prefix}rank_restarts_total{{rank={rank}}}"] == 0
        assert after[f"{prefix}rank_up{{rank={rank}}}"] == 1
    # What a router in front of this server takes for T of its ranks.
    assert cost.threshold_flops(server.status()["threshold_flops_per_layer"]) == pytest.approx(batch)


def test_a_named_rank_answers(server: Server) -> None:
    body = {"input_ids": prompt(1), "sampling_params": NOTHING_NEW}
    for rank in (0, 1):
        answer = server.post("/generate", {**body, "routed_dp_rank": rank}).json()
        assert answer["meta_info"]["dp_rank"] == rank
    assert router(server)["reasons"]["pinned"] >= 2


def test_a_flush_reaches_the_routers_view(server: Server) -> None:
    server.log_probabilities([prompt(2)], LABELS)
    assert router(server)["view_tokens"] > 0
    assert server.post("/flush_cache", {}).status_code == 200
    wait_until(lambda: router(server)["view_tokens"] == 0)


def test_an_abort_is_answered(server: Server) -> None:
    ranks = [rank["pid"] for rank in server.status()["ranks"]]
    bodies = [
        {"input_ids": [prompt(9000 + i + k) * 6 for k in range(4)], "sampling_params": NOTHING_NEW} for i in range(10)
    ]
    with ThreadPoolExecutor(10) as pool:
        # Ranks that stand still let work pile up in the router for sure.
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        try:
            answers = [pool.submit(server.post, "/generate", body) for body in bodies]
            wait_until(lambda: router(server)["pending"] > 0)
            server.post("/abort_request", {"abort_all": True})
            wait_until(lambda: router(server)["pending"] == 0)
        finally:
            for pid in ranks:
                # On a slow machine it has stood still for so long that the router has replaced it.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        assert {answer.result().status_code for answer in answers} <= {200, 400, 409, 499, 500, 503}
    assert all(rank["outstanding_flops"] == 0 for rank in router(server)["ranks"].values())
    assert server.log_probabilities([prompt(3)], LABELS)


def test_a_killed_rank_loses_nothing_and_comes_back(server: Server) -> None:
    numbers = [number % 50 for number in range(REQUESTS)]
    expected = {number: server.log_probabilities([prompt(number)], LABELS)[0] for number in set(numbers)}
    server.post("/flush_cache", {})
    ranks = server.status()["ranks"]
    # Stopped, it has work for certain when it is killed.
    os.kill(ranks[1]["pid"], signal.SIGSTOP)
    with ThreadPoolExecutor(64) as pool:
        # The first token differs, so that the prefix cache cannot answer for the rank.
        answers = [pool.submit(server.log_probabilities, [prompt(number)], LABELS) for number in numbers]
        # Slow clients make so little work at a time that one rank takes all of it; this one is for the other.
        pinned = pool.submit(server.log_probabilities, [prompt(0)], LABELS, routed_dp_rank=1)
        wait_until(lambda: router(server)["ranks"]["1"]["requests_in_flight"] > 0)
        os.kill(ranks[1]["pid"], signal.SIGKILL)
        for number, answer in zip(numbers, answers, strict=True):
            assert answer.result()[0] == pytest.approx(expected[number], abs=1e-3)
        assert pinned.result()[0] == pytest.approx(expected[0], abs=1e-3)
    wait_until(lambda: all(router(server)["alive"]))
    now = server.status()["ranks"]
    assert now[0]["pid"] == ranks[0]["pid"]
    assert now[1]["pid"] != ranks[1]["pid"]
    assert (now[1]["restarts"], now[1]["bytes_reread"]) == (1, 0)
    assert metrics(server)["asyncep_router_rank_restarts_total{rank=1}"] == 1
    answer = server.post("/generate", {"input_ids": prompt(1), "sampling_params": NOTHING_NEW, "routed_dp_rank": 1})
    assert answer.json()["meta_info"]["dp_rank"] == 1


def test_an_idle_router_sleeps(server: Server) -> None:
    controller = next(p for p in server.processes() if "controller" in " ".join(p.cmdline()))
    before = controller.cpu_times()
    interval = 3.0
    psutil.cpu_percent(interval=interval)
    after = controller.cpu_times()
    used = after.user + after.system - before.user - before.system
    # Upstream's takes half a core to a whole one here.
    assert used < 0.05 * interval


def test_a_lone_rank_computes_a_common_prefix_once(lone: Server) -> None:
    shared = prompt(1)[:256]
    body = {"input_ids": [shared + [6 + i] * 20 for i in range(40)], "sampling_params": NOTHING_NEW}
    cached = sorted(answer["meta_info"]["cached_tokens"] for answer in lone.post("/generate", body).json())
    assert cached == [0] + [len(shared)] * 39
    assert router(lone)["finished"] >= 40


def test_a_single_request_passes_the_list_that_its_rank_has_already(lone: Server) -> None:
    """The rank is stopped until it has been sent both, so that it finds them together."""
    listed = {"input_ids": [prompt(number)[:64] for number in range(300)], "sampling_params": NOTHING_NEW}
    single = {"input_ids": prompt(400)[:3], "sampling_params": NOTHING_NEW}

    def in_flight() -> int:
        return int(router(lone)["ranks"]["0"]["requests_in_flight"])

    lone.post("/flush_cache", {})
    pid = lone.status()["ranks"][0]["pid"]
    with ThreadPoolExecutor(2) as pool:
        os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            answers = pool.submit(lone.post, "/generate", listed)
            wait_until(lambda: router(lone)["pending"] + in_flight() == len(listed["input_ids"]))
            sent = in_flight()
            after = time.monotonic() - began
            answer = pool.submit(lone.post, "/generate", single)
            # The rank has all that it may have of the list.
            wait_until(lambda: in_flight() == sent + 1)
        finally:
            os.kill(pid, signal.SIGCONT)
        ended = after + answer.result().json()["meta_info"]["e2e_latency"]
        earlier = sum(each["meta_info"]["e2e_latency"] < ended for each in answers.result().json())
    # Half a batch of the list may share its batch; without passing all that had been sent but its own batch is earlier.
    assert sent >= 64
    assert earlier < sent / 2


def test_a_lone_rank_that_is_killed_loses_nothing(lone: Server) -> None:
    numbers = [number % 20 for number in range(100)]
    expected = {number: lone.log_probabilities([prompt(number)], LABELS)[0] for number in set(numbers)}
    lone.post("/flush_cache", {})
    rank = lone.status()["ranks"][0]
    os.kill(rank["pid"], signal.SIGSTOP)
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(lone.log_probabilities, [prompt(number)], LABELS) for number in numbers]
        wait_until(lambda: router(lone)["ranks"]["0"]["requests_in_flight"] > 0)
        os.kill(rank["pid"], signal.SIGKILL)
        for number, answer in zip(numbers, answers, strict=True):
            assert answer.result()[0] == pytest.approx(expected[number], abs=1e-3)
    now = lone.status()["ranks"][0]
    assert (now["restarts"], now["bytes_reread"]) == (1, 0)
    assert now["pid"] != rank["pid"]
