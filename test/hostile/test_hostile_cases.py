"""The generator: what it reads from a document, which values it makes of it, that a seed means the same requests."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hostile import cases
from hostile.cases import Case, alone, changed, drawn, endless, improper, pairs, render
from hostile.fields import DEEP, INTEGERS, example, extremes
from hostile.schema import Route, alternatives, routes
from hypothesis import given
from hypothesis import strategies as st

SMALL: dict[str, Any] = {
    "paths": {
        "/generate": {
            "post": {"requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/G"}}}}},
            "put": {"requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/G"}}}}},
        },
        "/new": {
            "post": {"requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/N"}}}}}
        },
        "/health": {"get": {}},
    },
    "components": {
        "schemas": {
            "G": {
                "properties": {
                    "text": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
                    "sampling_params": {"type": "object", "additionalProperties": True},
                }
            },
            "SamplingParams": {"properties": {"top_k": {"type": "integer"}}},
            "N": {
                "properties": {
                    "count": {"type": "integer"},
                    "kind": {"enum": ["a", "b"]},
                    "inner": {"$ref": "#/components/schemas/I"},
                    "self": {"$ref": "#/components/schemas/N"},
                },
                "required": ["count", "inner"],
            },
            "I": {"properties": {"word": {"type": "string"}}, "required": ["word"], "type": "object"},
        }
    },
}


def test_routes_and_fields_are_read_from_a_document() -> None:
    found = {route.name: route for route in routes(SMALL)}
    assert list(found) == ["POST /generate", "PUT /generate", "POST /new", "GET /health"]
    # What stands in an object of which the document says nothing is there too.
    assert "sampling_params.top_k" in [field.name for field in found["POST /generate"].fields]
    assert [field.name for field in found["POST /new"].fields][:4] == ["count", "kind", "inner", "inner.word"]
    assert found["POST /new"].required == ("count", "inner")
    assert found["GET /health"].fields == ()


def test_every_field_meets_every_extreme_of_its_type() -> None:
    tops = [case for case in alone(routes(SMALL)) if case.changed[0][0] == "sampling_params.top_k"]
    assert {case.changed[0][1] for case in tops} >= set(INTEGERS)
    # In a single prompt and in a list, and with the rest of an honest request about it.
    assert len(tops) == len(extremes({"type": "integer"})) * len(cases.forms(routes(SMALL)[0]))
    assert all(b'"max_new_tokens":0' in case.content for case in tops)
    assert not any(case.method == "PUT" for case in alone(routes(SMALL)))


def test_a_route_that_is_not_known_is_sent_what_it_requires() -> None:
    new = next(route for route in routes(SMALL) if route.path == "/new")
    (form,) = cases.forms(new)
    assert json.loads(render(form)) == {"count": 1, "inner": {"word": "a b"}}


@pytest.mark.parametrize("kind", ["integer", "number", "string", "array", "object", "boolean", None])
def test_extremes_are_json_text_and_each_is_there_once(kind: str | None) -> None:
    found = extremes({} if kind is None else {"type": kind})
    assert len(found) == len(set(found)) > 10
    for value in found:
        try:
            json.loads(value)
        except RecursionError:
            assert len(value) >= 2 * DEEP


@given(st.recursive(st.sampled_from(["1", '"a"', "null", "NaN"]), lambda inner: st.dictionaries(st.text(), inner)))
def test_a_tree_is_rendered_as_json(tree: Any) -> None:
    if isinstance(tree, str):
        tree = {"a": tree}

    def value(part: Any) -> Any:
        return json.loads(part) if isinstance(part, str) else {key: value(inner) for key, inner in part.items()}

    assert json.dumps(json.loads(render(tree))) == json.dumps(value(tree))


def test_a_change_leaves_the_rest_as_it_was() -> None:
    before = {"a": "1", "b": {"c": "2", "d": "3"}}
    assert changed(before, ("b", "c"), "9") == {"a": "1", "b": {"c": "9", "d": "3"}}
    assert changed(before, ("a",), "[]") == {**before, "a": "[]"}
    assert changed({"b": '"text"'}, ("b", "c"), "9") == {"b": {"c": "9"}}
    assert before == {"a": "1", "b": {"c": "2", "d": "3"}}


def test_the_same_seed_means_the_same_requests() -> None:
    def first(seed: int) -> list[Case]:
        return list(itertools.islice(endless(routes(SMALL), seed, chunk=20), 150))

    assert first(5) == first(5)
    assert first(5) != first(6)
    assert len({(case.path, case.content) for case in first(5)}) > 100


def test_pairs_change_more_than_one_field() -> None:
    found = drawn(pairs(routes(SMALL)), 1, 200)
    assert max(len(case.changed) for case in found) >= 2
    assert {case.path for case in found} == {"/generate", "/new"}
    for case in found:
        assert all(value.encode() in case.content for _, value in case.changed[-1:] if value.isdigit())


def test_improper_requests_are_cut_mistyped_and_no_json() -> None:
    found = list(improper(routes(SMALL)))
    assert {case.manner for case in found} == {"whole", "cut", "left"}
    assert any(case.content.startswith(b"\xff") for case in found)
    assert any(dict(case.headers).get("expect") for case in found)
    assert any(case.path == "/health" for case in found)


def test_an_example_is_what_its_schema_allows() -> None:
    assert example({"type": "array", "items": {"enum": ["x"]}}) == '["x"]'
    assert example({"anyOf": [{"type": "null"}, {"type": "integer"}]}) == "1"


def test_the_installed_sglangs_fields_are_all_there(document: dict[str, Any]) -> None:
    """The document is SGLang's own: what its models name is attacked, sampling parameters and sessions included."""
    import msgspec
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest, ScoringRequest
    from sglang.srt.sampling.sampling_params import SamplingParams

    found: dict[str, Route] = {route.name: route for route in routes(document)}
    sampling = {f"sampling_params.{field.name}" for field in msgspec.structs.fields(SamplingParams)}
    generate = {field.name for field in found["POST /generate"].fields}
    assert sampling <= generate
    assert {"session_params.id", "token_ids_logprob", "input_embeds"} <= generate
    for path, model in (
        ("/v1/completions", CompletionRequest),
        ("/v1/chat/completions", ChatCompletionRequest),
        ("/v1/score", ScoringRequest),
    ):
        assert set(model.model_fields) <= {field.name for field in found[f"POST {path}"].fields}
    # References are resolved, and every route that takes a body has an honest form of it.
    for route in found.values():
        for field in route.fields:
            assert not any("$ref" in part for part in alternatives(field.schema)), (route.name, field.name)
        if route.fields:
            assert all(json.loads(render(form)) is not None for form in cases.forms(route))
