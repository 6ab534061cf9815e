"""Bodies that SGLang would take long to find wrong are refused at once; what an endpoint takes passes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from typing import Annotated, Any

import orjson
import pytest
from fastapi import Body, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sglang.srt.entrypoints import http_server

from asyncep_sgl.front.endpoints import INFERENCE
from asyncep_sgl.front.invalid import answer_invalid, described
from asyncep_sgl.front.mistakes import without_sources
from asyncep_sgl.front.shapes import _LONG, _MANY, NODES, SHORT, ShapeGate, check_body, check_fields

VALUES = 1_000_000
ONES = [1] * 200_000

HONEST: list[dict[str, Any]] = [
    {},
    {"text": "x" * 10_000_000},
    {"text": ["a text"] * 16_384, "sampling_params": [{"max_new_tokens": 0}] * 16_384, "rid": ["r"] * 16_384},
    {"text": [["a question", "an answer"]] * 5000, "is_cross_encoder_request": True},
    {"input_ids": list(range(30_000))},
    {"input_ids": [list(range(500))] * 2000, "return_logprob": [True] * 2000, "logprob_start_len": [-1] * 2000},
    {"input_ids": [[1]] * 2000, "token_ids_logprob": [[5, 6, 7]] * 2000, "top_logprobs_num": [0] * 2000},
    {"input_ids": [[1]] * 300, "lora_path": [None, "a"] * 150},
    {"input_ids": [1, 2], "token_ids_logprob": list(range(50_000)), "return_logprob": True},
    {"model": "m", "prompt": ["a"] * 5000},
    {"model": "m", "input": [[1, 2, 3]] * 5000},
    {"query": "q", "items": ["an item"] * 10_000, "label_token_ids": [3, 4]},
    {"query": list(range(3000)), "items": [[1, 2]] * 10_000, "label_token_ids": [[3, 4]] * 10_000},
    {"query": "q", "documents": ["d"] * 5000},
    {"messages": [{"role": "user", "content": "hello"}] * 1000, "model": "m"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}], "model": "m"},
    {"messages": [], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": ["a"] * 200}}}]},
    {"instances": [{"text": "a"}] * 5000, "parameters": {}},
    {"tokens": [[1, 2]] * 5000},
    {"text": "a", "sampling_params": {"logit_bias": {str(number): 1.0 for number in range(900)}}},
]


@pytest.mark.parametrize("fields", HONEST, ids=lambda fields: " ".join(fields)[:60] or "empty")
def test_what_endpoints_take_passes(fields: dict[str, Any]) -> None:
    check_body(orjson.dumps(fields), VALUES, "/classify" if "is_cross_encoder_request" in fields else "/generate")


@given(st.integers(1, 600), st.integers(1, 600), st.sampled_from(["input_ids", "token_ids_logprob", "prompt"]))
def test_lists_of_any_size_pass_where_their_types_are_right(prompts: int, tokens: int, name: str) -> None:
    check_fields({name: [[3] * tokens] * prompts}, VALUES, "/generate")
    check_fields({name: [3] * prompts, "text": ["a"] * prompts, "rid": ["r"] * tokens}, VALUES, "/generate")


# Any JSON, with the names that are looked for at any depth.
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*_LONG, *_MANY, "tools", "content", "role", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*_LONG, *_MANY, "tools"]), _ANY, max_size=4), st.sampled_from(INFERENCE))
@example({"messages": [{"tools": None}]}, "/v1/chat/completions")
def test_any_json_is_passed_on_or_refused(fields: dict[str, Any], path: str) -> None:
    with contextlib.suppress(ValueError):
        check_fields(fields, VALUES, path)


HOSTILE: list[tuple[Any, str]] = [
    (ONES, "not a JSON object"),
    ({"text": ONES}, r"text\[0\]: 1: a string is needed"),
    ({"text": ["a"] * 1000 + [None]}, r"text\[1000\]: None: a string is needed"),
    ({"text": [ONES]}, r"text\[0\]: \[1, 1.*: a string is needed"),
    ({"text": [{"a": 1}] * 1000}, r"text\[0\]"),
    ({"input_ids": [[1]] * 1000 + [["a"]]}, r"input_ids\[1000\]\[0\]: 'a': a whole number is needed"),
    ({"input_ids": [1.5] * 1000}, r"input_ids\[0\]: 1.5"),
    ({"input_ids": [True] * 1000}, r"input_ids\[0\]: True"),
    ({"token_ids_logprob": [[1], 2] * 1000}, r"token_ids_logprob\[1\]: 2: a list is needed"),
    ({"return_logprob": ONES}, r"return_logprob\[0\]"),
    ({"prompt": [{}] * 1000}, "prompt"),
    ({"messages": ONES}, "messages"),
    ({"messages": [{}] * 10_000}, "messages"),
    ({"sampling_params": ONES}, "sampling_params"),
    ({"sampling_params": [1] * 5}, "sampling_params: a list of objects"),
    ({"stop": ["a"] * (NODES + 1)}, f"stop: over {NODES}"),
    ({"anything": {str(number): 1 for number in range(NODES + 1)}}, "anything: over"),
    ({"tools": [{"parameters": {"properties": {f"p{n}": {"type": "string"} for n in range(700)}}}]}, "tools: over"),
    ({"tools": [{"type": [{"a": number} for number in range(100)]}]}, "tools: a list of 100 entries"),
    ({"messages": [{"role": "user", "tools": [{"type": [{"a": n} for n in range(100)]}]}]}, "tools: a list"),
    ({"query": "q", "items": ["a"] * 16_384, "label_token_ids": list(range(50_000))}, "items, label_token_ids: 16384"),
    ({f"f{number}": 1 for number in range(1000)}, "1000 fields"),
]


@pytest.mark.parametrize(("fields", "named"), HOSTILE, ids=[named[:40] for _, named in HOSTILE])
def test_what_would_take_long_is_refused_by_name(fields: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named) as raised:
        check_fields(fields, VALUES)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("body", [b"{", b'{"text": NaN}', b'"\xff"', b"[" * 5000 + b"]" * 5000, b'{"a": "\\ud800"}'])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(Exception, match=r"not JSON|not a JSON object"):
        check_body(body, VALUES)


NAMES = sorted({*_LONG, *_MANY, "tools", "stop", "logit_bias", "image_data", "other"})
ENTRIES: list[Any] = [1, True, None, "a", {}, [], [1], ["a"], [[1]]]


def _models() -> dict[str, Any]:
    """The body that SGLang reads on each endpoint of ours that reads prompts."""
    routes = [route for route in http_server.app.routes if isinstance(route, APIRoute) and route.path in INFERENCE]
    return {route.path: route.dependant.body_params[0].field_info for route in routes if route.dependant.body_params}


MODELS = _models()
DIFFERENT = sorted({str(model.annotation): path for path, model in MODELS.items()}.values())


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    for path, model in MODELS.items():

        def read(request: Any) -> int:
            return 1

        read.__annotations__["request"] = Annotated[model.annotation, Body()]
        app.post(path)(read)
    app.exception_handlers[RequestValidationError] = http_server.app.exception_handlers[RequestValidationError]
    answer_invalid(app)
    app.add_middleware(ShapeGate, paths=tuple(MODELS), most_values=VALUES)
    return TestClient(app)


def test_the_models_are_sglang_s() -> None:
    assert len(MODELS) >= 15, sorted(MODELS)


@pytest.mark.parametrize("path", DIFFERENT)
def test_no_large_body_of_wrong_types_takes_long(client: TestClient, path: str) -> None:
    """Each field that may be long, with 150 kB of each kind of entry, against reading as much of good texts."""

    def seconds(body: bytes) -> float:
        # A server has frozen what it has imported: its collections do not walk through all of that.
        gc.freeze()
        began = time.process_time()
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400), answer.text[:500]
        assert len(answer.content) < 2000
        return time.process_time() - began

    good = orjson.dumps({"text": ["a text of some length"] * 6_000})
    usual = max(seconds(good) for _ in range(3))
    for name in NAMES:
        for entry in ENTRIES:
            one = orjson.dumps(entry) + b","
            body = b'{"%b":[%b%b]}' % (name.encode(), one * (150_000 // len(one)), orjson.dumps(entry))
            assert seconds(body) < 30 * usual + 0.4, f"{name}: {entry!r}"


def test_the_gate_passes_a_body_on_once_and_then_what_the_connection_says() -> None:
    async def run() -> list[Any]:
        got: list[Any] = []

        async def app(_scope: Any, receive: Any, _send: Any) -> None:
            got.extend([await receive(), await receive()])

        left = [{"type": "http.request", "body": b'{"text":"a"}'}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return left.pop(0)

        await ShapeGate(app, tuple(MODELS), VALUES)({"type": "http", "path": "/generate/"}, receive, None)  # type: ignore[arg-type]
        return got

    assert [message["type"] for message in asyncio.run(run())] == ["http.request", "http.disconnect"]


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=5),
        max_leaves=40,
    )
)
def test_whatever_is_small_is_left_to_sglang(value: Any) -> None:
    check_fields(dict.fromkeys(("text", "input_ids", "anything", "rid"), value), VALUES)


def test_an_invalid_body_is_answered_with_its_fields_and_shortly(client: TestClient) -> None:
    wrong = {"text": "a", "stream": " " * 1_000_000 + "x", "log_metrics": "maybe", "background": 7}
    answer = client.post("/generate", json=wrong)
    assert answer.status_code == 400
    body = answer.json()
    assert body["code"] == 400
    assert all(f"{name}: " in body["message"] for name in wrong if name != "text")
    assert len(answer.content) < 1000
    assert (
        described([{"loc": ("body", "a"), "msg": "m", "input": 1}] * 5) == "; ".join(["a: 1: m"] * 3) + " (and 2 more)"
    )


def test_cleaning_an_error_takes_time_as_its_length_and_not_as_the_square() -> None:
    began = time.process_time()
    for text in (" " * 1_000_000 + "x", 'File "' * 200_000, "/a" * 500_000, 'File "x", line 1, in y\n' * 50_000):
        assert len(without_sources(text)) <= 2000
    assert time.process_time() - began < 5.0
    assert without_sources('bad\n  File "/a/b/c.py", line 3, in f\n    x = 1') == "bad"


def test_short_means_that_a_handful_passes() -> None:
    check_fields({"text": [1] * SHORT, "image_data": [[]] * SHORT}, VALUES)
