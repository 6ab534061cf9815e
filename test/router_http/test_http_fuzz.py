"""Whatever JSON a client sends, it becomes a plan or a refusal: never an error of the router's own."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
NAMES = [
    *("input_ids", "text", "prompt", "input", "items", "query", "documents", "messages", "label_token_ids", "n"),
    *("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob", "rid"),
    *("stream", "priority", "routed_dp_rank", "data_parallel_rank", "lora_path", "extra_key", "cache_salt", "model"),
    *("apply_softmax", "temperature", "item_first", "return_token_logprobs", "image_data", "input_embeds", "echo"),
]
LIKELY = st.one_of(VALUES, TOKENS, st.lists(TOKENS, max_size=4), st.lists(st.text(max_size=5), max_size=4))
BODIES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), LIKELY, max_size=6)


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
@settings(max_examples=50)
@given(body=BODIES, tokenizes=st.booleans())
def test_every_body_is_planned_or_refused(path: str, body: dict[str, Any], tokenizes: bool) -> None:
    try:
        plan = asyncio.run(plan_of(path, orjson.dumps(body), Words() if tokenizes else None))
    except Refusal as refusal:
        refused = int(refusal.status)
    else:
        refused = 0
    if refused:
        assert refused == 400
        return
    assert plan.prompts
    assert isinstance(plan.priority, int)
    for rank in (None, 3):
        assert isinstance(orjson.loads(plan.body(range(len(plan.prompts)), rank)), dict)
    for prompt in plan.prompts:
        assert len(prompt.token_ids) > 0 or not prompt.exact


@settings(max_examples=100)
@given(st.binary(max_size=60))
def test_every_string_of_bytes_is_a_body_or_refused(raw: bytes) -> None:
    with contextlib.suppress(BadRequest):
        assert isinstance(parse(raw), dict)
