"""A real server with keys: what hostile clients send, what they may not call, and what they do not learn."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server import Server

CLIENT_KEY, ADMIN_KEY, SLOW_KEY, LEFT_KEY = ("k3y-of-ann-1", "k3y-of-the-boss-2", "k3y-of-bob-3", "k3y-of-eve-4")
ANN, BOSS, BOB, EVE = ({"Authorization": f"Bearer {key}"} for key in (CLIENT_KEY, ADMIN_KEY, SLOW_KEY, LEFT_KEY))
_PREFILL = {"sampling_params": {"max_new_tokens": 0}}
_CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
_ECHO = {"model": "m", "prompt": "a", "max_tokens": 0, "echo": True, "logprobs": 1}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where PyTorch's compiler writes what it makes."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Path],
    serve: Callable[..., Server],
    compiled: Path,
) -> Server:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"ann {CLIENT_KEY}\nbob {SLOW_KEY} prompts_per_second=0.5\neve {LEFT_KEY}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        return serve(tiny_model(), "--api-key-file", str(keys), "--admin-api-key", ADMIN_KEY)


def _ask(server: Server, path: str, headers: dict[str, str], **how: Any) -> httpx.Response:
    method = how.pop("method", "POST")
    return httpx.request(method, server.url + path, headers=headers, timeout=60, **how)


def _honest(server: Server) -> None:
    answer = _ask(server, "/generate", ANN, json={"input_ids": [5, 6, 7], "token_ids_logprob": [9], **_PREFILL})
    assert answer.status_code == 200, answer.text


# The smallest requests that ended a rank, a server or other clients' patience, and their kin.
_HOSTILE: list[tuple[str, dict[str, Any], int, str]] = [
    ("/v1/completions", {**_ECHO, "top_k": 2147483648}, 400, "top_k"),
    ("/v1/completions", {**_ECHO, "seed": 2**70}, 400, '"seed: '),
    ("/v1/completions", {**_ECHO, "n": 1000000}, 400, "n"),
    ("/v1/completions", {**_ECHO, "logprobs": 2**40}, 400, '"logprobs: '),
    ("/v1/completions", {**_ECHO, "min_tokens": 2**40}, 400, '"min_tokens: '),
    ("/v1/completions", {**_ECHO, "logit_bias": {"100000000": 1}}, 400, "logit_bias"),
    ("/v1/completions", {**_ECHO, "prompt": ["a"] * 20000}, 400, "--asyncep-max-prompts"),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 0, "top_k": 2147483648}}, 400, "top_k"),
    ("/generate", {"text": "x" * 70000, **_PREFILL}, 400, "--asyncep-max-prompt-chars"),
    ("/generate", {"input_embeds": [], **_PREFILL}, 400, "input_ids"),
    ("/generate", {"input_embeds": [[0.0]], **_PREFILL}, 400, "text, input_ids"),
    (
        "/generate",
        {"text": ["a", "b"], "token_ids_logprob": [[5]], "return_logprob": True, **_PREFILL},
        400,
        "1 values",
    ),
    ("/generate", {"text": "a", "http_worker_ipc": "ipc://elsewhere", **_PREFILL}, 400, "http_worker_ipc"),
    ("/generate", {"text": "a", "rid": "HEALTH_CHECK_1", **_PREFILL}, 400, "rid"),
    (
        "/generate",
        {
            "input_ids": [[5] * 1000] * 4,
            "return_logprob": True,
            "logprob_start_len": 0,
            "token_ids_logprob": list(range(500)),
            **_PREFILL,
        },
        400,
        "--asyncep-max-logprobs",
    ),
    ("/v1/chat/completions", {**_CHAT, "tools": [{"type": "function", "function": 5}]}, 400, "tools"),
    ("/v1/chat/completions", {**_CHAT, "messages": "x" * 400_000}, 413, "--asyncep-max-prompt-chars"),
    ("/v1/rerank", {"query": "cats", "documents": ["a", "b"]}, 400, "/v1/score"),
    ("/v1/classify", {"model": "m", "input": "cats"}, 400, "/v1/score"),
    ("/v1/embeddings", {"model": "m", "input": "cats"}, 400, "/v1/score"),
    ("/v1/score", {"model": "m", "query": "q" * 60000, "items": ["i" * 6000], "label_token_ids": [1]}, 400, "items"),
    ("/v1/score", {"model": "m", "query": "q", "items": ["i"] * 20000, "label_token_ids": [1]}, 400, "items"),
    ("/v1/score", {"model": "m", "query": "q" * 50000, "items": ["i"] * 9000, "label_token_ids": [1]}, 400, "repeated"),
    ("/detokenize", {"tokens": [1, -5, 10**12]}, 400, "cannot be read"),
    ("/tokenize", {"prompt": "x" * 400_000}, 413, "--asyncep-max-prompt-chars"),
]


@pytest.mark.parametrize(("path", "body", "status", "said"), _HOSTILE, ids=lambda value: str(value)[:30])
def test_what_no_rank_can_hold_is_refused(
    server: Server, path: str, body: dict[str, Any], status: int, said: str
) -> None:
    answer = _ask(server, path, ANN, json=body)
    assert (answer.status_code, said in answer.text) == (status, True), answer.text[:500]
    assert "site-packages" not in answer.text


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/score", "/v1/rerank"])
@pytest.mark.parametrize(
    "body",
    [
        b'"x"',
        b"5",
        b"[]",
        b"null",
        b"{",
        b"",
        b'{"text":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"a":' * 900 + b"1" + b"}" * 900,
    ],
    ids=lambda body: str(body[:12]),
)
def test_bodies_of_every_shape_are_refused(server: Server, path: str, body: bytes) -> None:
    answer = _ask(server, path, {**ANN, "content-type": "application/json"}, content=body)
    assert 400 <= answer.status_code < 500, answer.text[:500]


def test_bodies_too_large_are_refused_before_they_are_read(server: Server) -> None:
    answer = _ask(server, "/generate", ANN, content=b"x" * (65 << 20))
    assert (answer.status_code, "--asyncep-max-body-bytes" in answer.text) == (413, True)


def test_control_endpoints_are_shut(server: Server) -> None:
    for headers, statuses in ((ANN, {403}), ({}, {401, 403})):
        for path in (
            "/start_profile",
            "/pause_generation",
            "/flush_cache",
            "/release_memory_occupation",
            "/open_session",
        ):
            for method in ("GET", "POST"):
                assert _ask(server, path, headers, method=method).status_code in statuses, path
    assert _ask(server, "/flush_cache", BOSS).status_code == 200
    assert "read-only" in _ask(server, "/update_weights_from_disk", BOSS, json={"model_path": "x"}).text
    schema = _ask(server, "/openapi.json", ANN, method="GET").json()["paths"]
    ours = {"/generate", "/asyncep/status", "/router/state"}
    assert ours <= set(schema), ours - set(schema)
    assert "/start_profile" not in schema


def test_pages_of_other_origins_may_not_call(server: Server) -> None:
    origin = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for method, headers in (("OPTIONS", origin), ("GET", {**ANN, **origin})):
        answer = _ask(server, "/v1/models", headers, method=method)
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_keys_are_nowhere_to_be_seen(server: Server) -> None:
    info = _ask(server, "/server_info", ANN, method="GET")
    assert info.status_code == 200
    assert _ask(server, "/server_info", {}, method="GET").status_code == 401
    metrics = httpx.get(server.url + "/metrics", timeout=30).text
    seen = [info.text, metrics, server.log.read_text(), *map(str, _command_lines(server))]
    for process in server.processes()[1:]:
        seen.append(str(process.environ()))
    for key in (CLIENT_KEY, ADMIN_KEY, SLOW_KEY, LEFT_KEY):
        assert not [text for text in seen if key in text]


def _command_lines(server: Server) -> list[list[str]]:
    found = []
    for process in server.processes():
        try:
            found.append(process.cmdline())
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"sampling_seed": 7, "temperature": 0.7},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
        {"min_new_tokens": 1, "logit_bias": {"5": 1.0}},
    ],
    ids=lambda sampling: "+".join(sampling),
)
def test_no_field_starts_a_compiler(server: Server, compiled: Path, sampling: dict[str, Any]) -> None:
    """A rank that compiles answers nobody meanwhile, for half a minute."""
    for count in (1, 3):
        body = {"text": ["a b c"] * count, "sampling_params": {"max_new_tokens": 1, **sampling}}
        answer = _ask(server, "/generate", ANN, json=body)
        assert answer.status_code == 200, answer.text
    assert not list(compiled.rglob("*.cpp"))


def test_a_rate_is_kept(server: Server) -> None:
    body = {"text": ["a"] * 5, **_PREFILL}
    assert _ask(server, "/generate", BOB, json=body).status_code == 200
    answer = _ask(server, "/generate", BOB, json=body)
    assert (answer.status_code, "prompts_per_second" in answer.text) == (429, True)
    _honest(server)


def _order(server: Server, who: dict[str, str], count: int) -> dict[str, Any]:
    body = {"text": "a", **_PREFILL}
    lines = [{"custom_id": str(n), "method": "POST", "url": "/generate", "body": body} for n in range(count)]
    data = "\n".join(json.dumps(line) for line in lines).encode()
    file = _ask(server, "/v1/files", who, data={"purpose": "batch"}, files={"file": ("rows.jsonl", data)}).json()
    order = {"input_file_id": file["id"], "endpoint": "/generate", "completion_window": "1h"}
    batch: dict[str, Any] = _ask(server, "/v1/batches", who, json=order).json()
    return batch


def _ended(server: Server, who: dict[str, str], batch_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        batch: dict[str, Any] = _ask(server, f"/v1/batches/{batch_id}", who, method="GET").json()
        if batch["status"] in ("completed", "failed", "cancelled", "expired"):
            return batch
        time.sleep(0.1)
    raise TimeoutError(batch_id)


def test_a_rate_is_kept_by_batches_too(server: Server) -> None:
    """A batch sends what its owner's bucket holds and then waits; others' batches do not."""
    held = _order(server, BOB, 60)["id"]
    deadline = time.monotonic() + 60
    while (now := _ask(server, f"/v1/batches/{held}", BOB, method="GET").json())["errors"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "prompts_per_second" in now["errors"]["data"][0]["message"]
    assert _ended(server, ANN, _order(server, ANN, 5)["id"])["request_counts"]["completed"] == 5
    assert _ask(server, f"/v1/batches/{held}/cancel", BOB).status_code == 200
    done = _ended(server, BOB, held)["request_counts"]
    # What ten seconds fill and one more, and what came in while this was looked at.
    assert 5 <= done["completed"] < 40
    assert done["failed"] == 60 - done["completed"]


def test_only_ones_own_requests_are_ended_and_their_clients_told(server: Server) -> None:
    several = {"input_ids": [[5 + n % 400] * 100 for n in range(64)], "rid": "ann-1", **_PREFILL}
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(_ask(server, "/generate", ANN, json=several)))
    last = "ann-1_63"
    ranks = [rank["pid"] for rank in _ask(server, "/asyncep/status", ANN, method="GET").json()["ranks"]]
    # However fast the machine is: the request is there until the ranks go on.
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    try:
        thread.start()
        deadline = time.monotonic() + 8
        while True:
            assert _ask(server, "/abort_request", EVE, json={"rid": last}).status_code == 404
            assert _ask(server, "/abort_request", EVE, json={"abort_all": True}).status_code == 403
            if _ask(server, "/abort_request", ANN, json={"rid": last}).status_code == 200:
                break
            assert time.monotonic() < deadline, answers
    finally:
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
    thread.join()
    assert answers[0].status_code == 409, answers[0].text[:300]
    _honest(server)


def test_a_request_for_a_token_gives_none_to_others(server: Server) -> None:
    """Those that ask for a token and those that ask for none come together, as those of different clients do."""
    tokens = [0, 1, 0, 0, 1, 0, 1, 0]
    body = {
        "input_ids": [[5 + place, 6, 7] for place in range(len(tokens))],
        "sampling_params": [{"max_new_tokens": count, "temperature": 0} for count in tokens],
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answers = _ask(server, "/generate", ANN, json=body).json()
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == tokens
    assert [len(answer["output_ids"]) for answer in answers] == tokens
    assert [len(answer["meta_info"]["output_token_logprobs"]) for answer in answers] == tokens


def test_the_server_is_as_it_was(server: Server) -> None:
    """After all of the above: no rank has died, and everybody is served."""
    state = _ask(server, "/router/state", ANN, method="GET").json()
    assert (state["restarts"], state["alive"]) == ([0, 0], [True, True])
    _honest(server)


def test_an_unused_connection_is_kept_longer_than_clients_keep_theirs(server: Server) -> None:
    """httpx's pool keeps 5 s, as SGLang does: who asks in that moment would lose a request."""
    line = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=6)
    with contextlib.closing(line):
        line.request("GET", "/v1/models", headers=ANN)
        assert line.getresponse().read()
        with pytest.raises(TimeoutError):
            line.sock.recv(1)  # its end would come as no bytes
