"""One server on two ranks: the same bits as stock SGLang, experts in memory once, every endpoint, and bad input."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tiny_models
from prometheus_client.parser import text_string_to_metric_families
from server import Server

pytestmark = pytest.mark.server

NOTHING_NEW = {"max_new_tokens": 0}
LABELS = [3, 17, 101]
PROMPTS = [[(11 * i + 5 * k) % 500 + 3 for i in range(20 + 17 * k)] for k in range(6)]


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], tiny_model: Callable[[str], Path]) -> Server:
    # SGLang's own kernels: this module compares bits with stock SGLang.
    return serve(tiny_model("qwen3_moe"), "--dtype", "bfloat16", "--asyncep-kernels", "sglang", "--enable-metrics")


def test_bits_are_those_of_stock_sglang(
    server: Server, serve: Callable[..., Server], tiny_model: Callable[[str], Path]
) -> None:
    stock = serve(tiny_model("qwen3_moe"), "--dtype", "bfloat16", stock=True)
    try:
        # One prompt a request, so that both sides form the same batches.
        theirs = [stock.log_probabilities([prompt], LABELS) for prompt in PROMPTS]
    finally:
        stock.stop()
    ours = [server.log_probabilities([prompt], LABELS) for prompt in PROMPTS]
    assert ours == theirs


def test_bits_do_not_depend_on_the_rank_that_answers(server: Server) -> None:
    def on(rank: int) -> list[list[list[float]]]:
        return [server.log_probabilities([prompt], LABELS, routed_dp_rank=rank) for prompt in PROMPTS]

    assert on(0) == on(1)


def test_experts_lie_in_memory_once(server: Server, tiny_model: Callable[[str], Path]) -> None:
    status = server.status()
    page = status["page_bytes"]
    assert 0 <= status["resident_bytes"] - status["expert_bytes"] < page * status["tensors"]
    ranks = status["ranks"]
    assert sum(rank["experts"] for rank in ranks) == 3 * 8
    # Each rank read what it owns and left the rest: together the checkpoint's experts, once.
    assert all(rank["bytes_read"] == rank["expert_bytes"] for rank in ranks)
    assert sum(rank["bytes_read"] for rank in ranks) == status["expert_bytes"]

    def mapped() -> int:
        """Proportional set size shares a page's bytes among the processes that map it: the kernel's own account."""
        regions = [region for process in server.processes() for region in process.memory_maps(grouped=False)]
        return sum(region.pss for region in regions if "memfd:asyncep-L" in region.path)

    # A kernel that reclaims idle memory takes pages out of the processes' tables: work brings them back.
    deadline = time.monotonic() + 60
    while abs(mapped() - status["resident_bytes"]) > page * status["tensors"] * len(ranks):
        assert time.monotonic() < deadline, (mapped(), status["resident_bytes"])
        for rank in range(len(ranks)):
            prompts = [[random.randrange(3, 500) for _ in range(300)] for _ in range(4)]
            server.log_probabilities(prompts, LABELS, routed_dp_rank=rank)


def test_sglang_is_imported_once(server: Server) -> None:
    """By the front; the others are forked from it. SGLang logs this line in each process that imports its models."""
    assert server.log.read_text().count("Ignore import error when loading sglang.srt.models.mamba") == 1


def test_ranks_divide_the_cpus(server: Server) -> None:
    affinities = [psutil.Process(rank["pid"]).cpu_affinity() for rank in server.status()["ranks"]]
    have = len(psutil.Process().cpu_affinity() or [])
    if have >= 2:
        assert not set(affinities[0] or []) & set(affinities[1] or [])


def test_metrics_are_sglangs_and_the_routers(server: Server) -> None:
    server.log_probabilities([PROMPTS[0]], LABELS)
    text = httpx.get(server.url + "/metrics", timeout=30).text
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {"asyncep_router_decisions", "sglang:prompt_tokens", "sglang:e2e_request_latency_seconds"} <= families
    asked = httpx.get(server.url + "/metrics", headers={"accept": "application/openmetrics-text"}, timeout=30)
    assert asked.headers["content-type"].startswith("application/openmetrics-text")


def test_endpoints_of_the_prefill_path(server: Server) -> None:
    text = {"text": ["one text", "another"], "sampling_params": NOTHING_NEW, "return_logprob": True}
    answers = server.post("/generate", {**text, "token_ids_logprob": LABELS}).json()
    assert [len(a["meta_info"]["output_token_ids_logprobs"][0]) for a in answers] == [3, 3]
    score = server.post(
        "/v1/score", {"query": "a", "items": [" b", " c"], "label_token_ids": LABELS, "apply_softmax": True}
    ).json()
    assert [pytest.approx(1) == sum(row) for row in score["scores"]] == [True, True]
    for tokens in (0, 1):
        body = {"model": "m", "prompt": "some words", "max_tokens": tokens, "echo": True, "logprobs": 1}
        choice = server.post("/v1/completions", body).json()["choices"][0]
        assert choice["text"].startswith("some words")
        assert len(choice["logprobs"]["token_logprobs"]) >= 4
    assert httpx.get(server.url + "/v1/models").status_code == 200


def bad_requests() -> dict[str, tuple[str, Any, str]]:
    """Name: path, body, the field the answer must name."""
    prompt = {"text": "fine", "sampling_params": NOTHING_NEW}
    return {
        "empty text": ("/generate", {**prompt, "text": ""}, "text"),
        "empty input_ids": ("/generate", {"input_ids": [], "sampling_params": NOTHING_NEW}, "input_ids"),
        "a megabyte": ("/generate", {**prompt, "text": "word " * 200_000}, "text"),
        "token out of vocabulary": ("/generate", {"input_ids": [5, 99_999], "sampling_params": NOTHING_NEW}, "input_ids[1]"),
        "negative token": ("/generate", {"input_ids": [5, -3], "sampling_params": NOTHING_NEW}, "input_ids[1]"),
        "negative max_new_tokens": ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
        "would decode": ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 9}}, "max_new_tokens"),
        "would decode by default": ("/generate", {"text": "a"}, "max_new_tokens"),
        "label out of vocabulary": ("/generate", {**prompt, "return_logprob": True, "token_ids_logprob": [99_999]}, "token_ids_logprob"),
        "label of text": ("/generate", {**prompt, "return_logprob": True, "token_ids_logprob": ["a"]}, "token_ids_logprob"),
        "malformed JSON": ("/generate", b'{"text": "abc', "JSON"),
        "text of a number": ("/generate", {**prompt, "text": 5}, "text"),
        "params of a list": ("/generate", {"text": "a", "sampling_params": [3]}, "sampling_params"),
        "too many logprobs": ("/generate", {**prompt, "return_logprob": True, "top_logprobs_num": 10**6}, "top_logprobs_num"),
        "negative start": ("/generate", {**prompt, "return_logprob": True, "logprob_start_len": -9}, "logprob_start_len"),
        "longer than the context": ("/generate", {"input_ids": [5] * (tiny_models.CONTEXT + 1), "sampling_params": NOTHING_NEW}, "context length leaves room for"),
        "rank that is none": ("/generate", {**prompt, "routed_dp_rank": 7}, "routed_dp_rank"),
        "score without labels": ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": []}, "label_token_ids"),
        "score label out of vocabulary": ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [99_999]}, "99999"),
        "completion that decodes": ("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 16}, "max_tokens: this server"),
        "completion too long": ("/v1/completions", {"model": "m", "prompt": [5] * tiny_models.CONTEXT, "max_tokens": 1}, "prompt: the prompt has"),
        "third of a list": ("/generate", {"input_ids": [[5], [6], [99_999]], "sampling_params": NOTHING_NEW}, "(entry 2 of the list, counted from 0)"),
        "late in a long list": ("/generate", {"input_ids": [*[[5]] * 150, [99_999]], "sampling_params": NOTHING_NEW}, "(entry 150 of the list, counted from 0)"),
        "new weights": ("/update_weights_from_disk", {"model_path": "elsewhere"}, "restart"),
    }  # fmt: skip


def test_bad_input_is_named_and_hurts_nobody(server: Server) -> None:
    expected = server.log_probabilities([PROMPTS[0]], LABELS)

    def good(_: int) -> list[list[float]]:
        return server.log_probabilities([PROMPTS[0]], LABELS)

    def bad(case: tuple[str, tuple[str, Any, str]]) -> str | None:
        name, (path, body, field) = case
        raw = {"content": body, "headers": {"content-type": "application/json"}} if isinstance(body, bytes) else None
        response = httpx.post(server.url + path, timeout=60, **(raw or {"json": body}))
        ok = 400 <= response.status_code < 500 and field in response.text
        return None if ok else f"{name}: {response.status_code} {response.text[:300]}"

    with ThreadPoolExecutor(80) as pool:
        goods = [pool.submit(good, i) for i in range(50)]
        wrong = [problem for problem in pool.map(bad, bad_requests().items()) if problem]
        assert not wrong
        for future in goods:
            # Batches differ from one prompt alone, and with them the order of sums: bf16's rounding, no more.
            assert future.result()[0] == pytest.approx(expected[0], abs=0.1)
    assert server.log_probabilities([PROMPTS[0]], LABELS) == expected
