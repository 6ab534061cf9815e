"""Whatever JSON a client sends, it becomes a plan or a refusal: never an error of the router's own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from array import array
from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep_router.http import generate, score
from asyncep_router.http.app import App
from asyncep_router.http.bounds import check_prompts
from asyncep_router.http.errors import BadRequest, Refusal
from asyncep_router.http.generate import plan_generate
from asyncep_router.http.plans import Plan, parse, plan_completion, plan_opaque
from asyncep_router.http.routes import INFERENCE
from asyncep_router.http.score import plan_score

NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
SMALL = st.none() | st.booleans() | st.integers(-3, 1200) | st.text(max_size=6)
VALUES = st.recursive(
    SMALL | NUMBERS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
TOKENS = st.lists(st.integers(-1, 1100), max_size=5)
# Every name that planning knows, and what it passes on.
NAMES = sorted(
    {"prompt", "input", "documents", "messages", "n", "echo", "routed_dp_rank", "data_parallel_rank", "cache_salt"}
    | {"token_ids_logprob", *generate._SHARED, *generate._EACH, *generate._PROMPTS, *generate._BEYOND_TEXT}
    | score._KNOWN
)
LIKELY = st.one_of(VALUES, TOKENS, st.lists(TOKENS, max_size=4), st.lists(st.text(max_size=5), max_size=4))
# What is planned prompt by prompt, of two prompts.
GOOD: list[dict[str, Any]] = [
    {"text": ["a", "b"]},
    {"input_ids": [[3, 4], [5]]},
    {"query": "q", "items": ["a", "b"], "label_token_ids": [3]},
    {"query": [1], "items": [[2], [3, 4]], "label_token_ids": [3, 4]},
    {"prompt": "a", "input": ["a", "b"], "documents": ["a"], "messages": [{"role": "user", "content": "a"}]},
    {},
]
ODD = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), LIKELY, max_size=3)
# Most are wrong in a few places only, so that what is behind the first check is reached.
BODIES = st.tuples(st.sampled_from(GOOD), ODD).map(lambda both: {**both[0], **both[1]})
ODD_VALUES: list[Any] = [
    *(None, True, 0, -1, 5, 2**63, 1.5, "", "a", "5", [], {}, {"a": 1}),
    *([None], [0], [True], ["a"], [{}], [[]], [[1]], [[], []], [[1], 2], [1, [2]], [["a"], ["b"]], [1, 2, 3]),
]


class Words:
    """A tokenizer: one token a character."""

    kind = "local"
    vocabulary: int | None = 1000

    async def encode(self, texts: Sequence[str]) -> list[array[int]]:
        return [array("q", map(ord, text)) for text in texts]


async def plan_of(path: str, raw: bytes, tokenizer: Words | None) -> Plan:
    fields = parse(raw)
    check_prompts(path, fields, 3)
    if path == "/generate":
        return await plan_generate(raw, fields, tokenizer)
    if path == "/v1/completions":
        return await plan_completion(raw, fields, tokenizer)
    if path == "/v1/score":
        return await plan_score(raw, fields, tokenizer, plain=True)
    return plan_opaque(path, raw, fields)


@pytest.mark.parametrize("path", [path for path, _ in INFERENCE])
@settings(max_examples=100)
@given(body=BODIES, tokenizes=st.booleans())
def test_every_body_is_planned_or_refused(path: str, body: dict[str, Any], tokenizes: bool) -> None:
    asyncio.run(check_planned(path, body, Words() if tokenizes else None))


@pytest.mark.parametrize("path", [path for path, _ in INFERENCE])
def test_every_odd_value_of_every_field_is_planned_or_refused(path: str) -> None:
    async def every() -> None:
        for good, name, odd in itertools.product(GOOD, NAMES, ODD_VALUES):
            try:
                await check_planned(path, {**good, name: odd}, Words())
            except Exception as error:
                error.add_note(f"{name}={odd!r} beside {good}")
                raise

    asyncio.run(every())


async def check_planned(path: str, body: dict[str, Any], tokenizer: Words | None) -> None:
    try:
        plan = await plan_of(path, orjson.dumps(body), tokenizer)
    except Refusal as found:
        refusal: Refusal | None = found
    else:
        refusal = None
    if refusal is not None:
        assert refusal.status == 400
        return
    assert plan.prompts
    assert isinstance(plan.priority, int)
    count = len(plan.prompts)
    for indices in (range(count), range(count - 1, count)):
        for rank in (None, 3):
            assert isinstance(orjson.loads(plan.body(indices, rank)), dict)
    for prompt in plan.prompts:
        assert len(prompt.token_ids) > 0 or not prompt.exact


@settings(max_examples=100)
@given(st.binary(max_size=60))
def test_every_string_of_bytes_is_a_body_or_refused(raw: bytes) -> None:
    with contextlib.suppress(BadRequest):
        assert isinstance(parse(raw), dict)


def test_a_body_that_cannot_be_planned_goes_to_a_worker_as_it_came() -> None:
    async def fails(*_: Any) -> Plan:
        raise IndexError("a fault of ours")

    app = App.__new__(App)
    app._plans = {"/v1/score": fails}
    raw = orjson.dumps({"query": "q", "items": ["a"]})
    plan = asyncio.run(app._plan("/v1/score", raw, parse(raw), "id"))
    assert (plan.path, plan.body([0], 1), plan.joined) == ("/v1/score", raw, False)
