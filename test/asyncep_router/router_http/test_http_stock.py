"""In front of stock SGLang, without any of our code in the worker: the router's answers are the worker's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server import Server

from router_http.harness import RouterProcess, wait_for

pytestmark = pytest.mark.server

# Computed in fp32: sums in another order, as batches of another size give, differ this little.
TOLERANCE = {"rel": 1e-4, "abs": 1e-5}


@pytest.fixture(scope="module")
def worker(tiny_model: Callable[[str], Path], serve: Callable[..., Server]) -> Server:
    return serve(tiny_model("qwen3_moe"), "--dtype", "float32", "--dp-size", "1", stock=True)


@pytest.fixture(scope="module")
def routed(worker: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    process = RouterProcess(worker.url, log=tmp_path_factory.mktemp("router") / "log.txt")
    try:
        process.ready(1)
        wait_for(lambda: process.state()["tokenizer"] != "none", "tokenizer loaded")
        yield process
    finally:
        process.stop()


def both(worker: Server, routed: RouterProcess, path: str, body: Any) -> tuple[Any, Any]:
    """(direct answer, the router's), after checking that their statuses agree."""
    direct, through = worker.post(path, body), routed.post(path, body)
    assert through.status_code == direct.status_code, through.text
    return direct.json(), through.json()


def test_the_worker_is_stock(worker: Server) -> None:
    assert httpx.get(worker.url + "/asyncep/status", timeout=30).status_code == 404


def test_what_it_learnt(worker: Server, routed: RouterProcess, tiny_model: Callable[[str], Path]) -> None:
    state = routed.state()
    assert state["tokenizer"] == "local"
    assert state["cost_model"] == tiny_model("qwen3_moe").name
    assert [(rank["worker"], rank["dp_rank"]) for rank in state["ranks"]] == [(worker.url, 0)]


@pytest.mark.parametrize(
    "prompt",
    [
        {"text": "one prompt"},
        {"text": ["two prompts", "of text, of different lengths"]},
        {"input_ids": [5, 6, 7, 8]},
        {"input_ids": [[5, 6, 7], [8], [9, 10, 11, 12]]},
    ],
    ids=str,
)
def test_generate_is_the_workers(worker: Server, routed: RouterProcess, prompt: dict[str, Any]) -> None:
    body = {
        **prompt,
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "token_ids_logprob": [7, 8, 9],
    }
    direct, through = both(worker, routed, "/generate", body)
    assert isinstance(through, list) == isinstance(direct, list)
    for mine, theirs in zip(*((x if isinstance(x, list) else [x]) for x in (through, direct)), strict=True):
        assert mine["meta_info"]["prompt_tokens"] == theirs["meta_info"]["prompt_tokens"]
        rows = [each["meta_info"]["output_token_ids_logprobs"][0] for each in (mine, theirs)]
        assert [row[1] for row in rows[0]] == [row[1] for row in rows[1]] == [7, 8, 9]
        assert [row[0] for row in rows[0]] == pytest.approx([row[0] for row in rows[1]], **TOLERANCE)


def test_decoding_is_the_workers_to_do(worker: Server, routed: RouterProcess) -> None:
    """Stock SGLang decodes, and the router does not stand in its way."""
    body = {"input_ids": [5, 6, 7, 8], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    direct, through = both(worker, routed, "/generate", body)
    assert through["output_ids"] == direct["output_ids"]
    assert len(direct["output_ids"]) == 4


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"apply_softmax": True},
        {"item_first": True},
        {"items": " one single item"},
        {"query": [5, 6, 7, 8], "items": [[9, 10], [11], [12, 13, 14]]},
        {"query": None},
        {"label_token_ids": [100000]},
    ],
    ids=str,
)
def test_score_is_the_workers(worker: Server, routed: RouterProcess, change: dict[str, Any]) -> None:
    body = {
        "query": "Is this a good review? ",
        "items": ["It was bad.", "It was very good indeed.", "Hm."],
        "label_token_ids": [10, 20, 30],
        **change,
    }
    direct, through = both(worker, routed, "/v1/score", body)
    assert through.keys() == direct.keys()
    mine, theirs = through.pop("scores", None), direct.pop("scores", None)
    assert (mine is None) == (theirs is None)
    for row, other in zip(mine or (), theirs or (), strict=True):
        assert row == pytest.approx(other, **TOLERANCE)
    assert through == direct


def test_prefixes_are_followed_and_settled(routed: RouterProcess) -> None:
    ids = [number % 400 + 50 for number in range(640)]
    for _ in range(3):
        answer = routed.post("/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}})
        assert answer.status_code == 200
    (rank,) = routed.state()["placement"]["ranks"].values()
    assert rank["expected_cached_tokens"] >= 2 * 576  # two prompts less their last block
    assert rank["found_cached_tokens"] >= rank["expected_cached_tokens"]
