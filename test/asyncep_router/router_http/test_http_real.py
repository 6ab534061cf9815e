"""In front of a real server with two ranks: the router's answers are the server's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from server import Server

from router_http.harness import RouterProcess, wait_for

pytestmark = pytest.mark.server

# The server computes in fp32: sums in another order, as batches of another size give, differ this little.
TOLERANCE = {"rel": 1e-4, "abs": 1e-5}


class Pair(NamedTuple):
    direct: Server
    router: RouterProcess


@pytest.fixture(scope="module")
def pair(
    tiny_model: Callable[[str], Path], serve: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    server = serve(tiny_model("qwen3_moe"), "--dtype", "float32", ranks=2)
    router = RouterProcess(server.url, log=tmp_path_factory.mktemp("router") / "log.txt", flags="--log-decisions")
    try:
        router.ready(1)
        wait_for(lambda: router.state()["tokenizer"] != "none", "tokenizer loaded")
        yield Pair(server, router)
    finally:
        router.stop()


def both(pair: Pair, path: str, body: Any) -> tuple[Any, Any]:
    """(direct answer, the router's), after checking that their statuses agree."""
    direct, routed = pair.direct.post(path, body), pair.router.post(path, body)
    assert routed.status_code == direct.status_code, routed.text
    return direct.json(), routed.json()


def decisions(router: RouterProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in router.log.read_text().splitlines() if line.startswith('{"event"')]


def test_what_it_learnt(pair: Pair, tiny_model: Callable[[str], Path]) -> None:
    state = pair.router.state()
    assert state["tokenizer"] == "local"
    assert state["cost_model"] == tiny_model("qwen3_moe").name
    assert [(rank["worker"], rank["dp_rank"]) for rank in state["ranks"]] == [
        (pair.direct.url, 0),
        (pair.direct.url, 1),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"apply_softmax": True},
        {"apply_softmax": True, "temperature": 0.5},
        {"item_first": True},
        {"items": " one single item"},
        {"query": [5, 6, 7, 8], "items": [[9, 10], [11], [12, 13, 14]]},
        {"label_token_ids": [[3, 4], [5, 6], [7, 8]]},
        {"return_token_logprobs": True},
        {"query": None},
        {"model": "some-name"},
    ],
    ids=str,
)
def test_score_is_the_servers(pair: Pair, change: dict[str, Any]) -> None:
    body = {
        "query": "Is this a good review? ",
        "items": ["It was bad.", "It was very good indeed.", "Hm."],
        "label_token_ids": [10, 20, 30],
        **change,
    }
    before = len(decisions(pair.router))
    direct, routed = both(pair, "/v1/score", body)
    prompts = 1 if isinstance(body["items"], str) else len(body["items"])
    assert len(decisions(pair.router)) == before + prompts  # every item was placed
    assert routed.keys() == direct.keys()
    for key in ("scores", "token_logprobs"):
        mine, theirs = routed.pop(key), direct.pop(key)
        if theirs is None:
            assert mine is None
            continue
        assert len(mine) == len(theirs)
        for row, other in zip(mine, theirs, strict=True):
            assert row == pytest.approx(other, **TOLERANCE)
    assert routed == direct


@pytest.mark.parametrize(
    "change",
    [
        {"label_token_ids": [100000]},
        {"label_token_ids": []},
        {"label_token_ids": [3, 3]},
        {"temperature": 3.0},
        {"items": []},
        {"query": [1], "items": ["a"]},
    ],
    ids=str,
)
def test_odd_scores_are_answered_as_the_server_does(pair: Pair, change: dict[str, Any]) -> None:
    direct, routed = both(pair, "/v1/score", {"query": "q", "items": ["a"], "label_token_ids": [1], **change})
    assert routed == direct


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
def test_generate_is_the_servers(pair: Pair, prompt: dict[str, Any]) -> None:
    body = {
        **prompt,
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "token_ids_logprob": [7, 8, 9],
    }
    direct, routed = both(pair, "/generate", body)
    assert isinstance(routed, list) == isinstance(direct, list)
    for mine, theirs in zip(*((x if isinstance(x, list) else [x]) for x in (routed, direct)), strict=True):
        assert mine["meta_info"]["prompt_tokens"] == theirs["meta_info"]["prompt_tokens"]
        pairs = zip(
            mine["meta_info"]["output_token_ids_logprobs"][0],
            theirs["meta_info"]["output_token_ids_logprobs"][0],
            strict=True,
        )
        for (value, token, _), (other, same, _) in pairs:
            assert token == same
            assert value == pytest.approx(other, rel=0.02, abs=0.02)


def test_bad_requests_are_the_servers_to_refuse(pair: Pair) -> None:
    for body in ({"input_ids": [99999]}, {"text": "decodes", "sampling_params": {"max_new_tokens": 50}}, {}):
        direct, routed = both(pair, "/generate", body)
        assert routed.keys() == direct.keys()


def test_cached_tokens_are_settled(pair: Pair) -> None:
    ids = [number % 400 + 50 for number in range(640)]
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}}
    for _ in range(3):
        assert pair.router.post("/generate", body).status_code == 200
    ranks = pair.router.state()["placement"]["ranks"].values()
    found = sum(rank["found_cached_tokens"] for rank in ranks)
    expected = sum(rank["expected_cached_tokens"] for rank in ranks)
    assert expected >= 2 * 576  # two prompts less their last block
    assert found >= expected
    # All went to the rank that holds them.
    assert len({entry["dp_rank"] for entry in decisions(pair.router) if entry["tokens"] == 640}) == 1
