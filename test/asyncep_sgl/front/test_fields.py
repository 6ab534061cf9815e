"""The tables of request fields: complete against the installed SGLang, strict against whatever a client sends."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from asyncep_sgl.front.fields import (
    BY_VOCABULARY,
    EMBEDDING,
    GENERATE,
    PER_PROMPT,
    PROMPTS,
    Bounds,
    answer_values,
    check_request,
    sampling,
)
from asyncep_sgl.front.rules import Refused

BOUNDS = Bounds(vocabulary=512, max_prompts=8, max_prompt_chars=100, max_samples=4, max_values=1000)
INT32 = 2**31 - 1

# What no field means: each is refused, or is the field's default.
_EXTREMES: list[Any] = [
    -(2**63) - 1,
    -(2**63),
    -(2**31) - 1,
    -2,
    2**30 + 1,
    2**31,
    2**63,
    10**400,
    1e308,
    -1e308,
    float("inf"),
    float("nan"),
    "\ud83d",
    "x" * 100_000,
    b"bytes",
    [[]],
    [None],
    [[1], [2], [3]],
    {"a": {"b": {}}},
    {"\ud83d": 1},
    object(),
]


def _request(cls: type, **fields: Any) -> Any:
    prompt = {} if "text" in fields or "input_ids" in fields else {"text": "a"}
    return cls(**{**prompt, **fields})


def _refusal(request: Any) -> str | None:
    """What is said against a request; None if it is taken."""
    try:
        prompts = check_request(request, BOUNDS)
    except ValueError as error:
        return str(error)
    assert 1 <= prompts <= BOUNDS.max_prompts
    return None


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def test_every_field_of_sglangs_requests_is_decided_on() -> None:
    assert set(GENERATE) | PROMPTS | BY_VOCABULARY | PER_PROMPT == _names(GenerateReqInput)
    # Some of those that go with a list of prompts are not fields of embedding requests.
    known = set(EMBEDDING) | PROMPTS | BY_VOCABULARY | PER_PROMPT
    assert _names(EmbeddingReqInput) <= known
    assert set(EMBEDDING) <= _names(EmbeddingReqInput)
    assert set(sampling(BOUNDS)) == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize("cls", [GenerateReqInput, EmbeddingReqInput])
def test_defaults_are_taken(cls: type) -> None:
    assert check_request(_request(cls), BOUNDS) == 1
    assert check_request(_request(cls, text=["a", "b"]), BOUNDS) == 2
    assert check_request(_request(cls, input_ids=[1, 2, 3]), BOUNDS) == 1
    assert check_request(_request(cls, input_ids=[[1], [2, 3]]), BOUNDS) == 2
    for decodes in (False, True):
        bounds = dataclasses.replace(BOUNDS, decodes=decodes)
        stock = SamplingParams()
        params = {name: getattr(stock, name) for name in SamplingParams.__struct_fields__}
        assert check_request(_request(cls, sampling_params=params), bounds) == 1


@pytest.mark.parametrize("cls", [GenerateReqInput, EmbeddingReqInput])
@pytest.mark.parametrize("value", _EXTREMES, ids=lambda value: repr(value)[:20])
def test_a_field_takes_only_what_a_rank_can_hold(cls: type, value: Any) -> None:
    for name in _names(cls) - PROMPTS:
        for prompts in ("a", ["a", "b"]):
            refusal = _refusal(_request(cls, text=prompts, **{name: value}))
            if refusal is None:
                assert _can_be_held(name, value), f"{name}: {value!r} was taken"
            else:
                assert refusal.startswith(name), f"{name}: {refusal}"
                assert len(refusal) < 500


@pytest.mark.parametrize("value", _EXTREMES, ids=lambda value: repr(value)[:20])
def test_a_sampling_parameter_takes_only_what_a_rank_can_hold(value: Any) -> None:
    for name in SamplingParams.__struct_fields__:
        refusal = _refusal(_request(GenerateReqInput, sampling_params={name: value}))
        if refusal is None:
            assert _can_be_held(name, value), f"{name}: {value!r} was taken"
        else:
            assert refusal.startswith(f"sampling_params.{name}: "), f"{name}: {refusal}"


def _can_be_held(name: str, value: Any) -> bool:
    """Whether a value of the extremes fits what SGLang makes of the field: 32 bits, but for a seed and a time."""
    if name == "external_trace_header":
        return value == {}
    if name == "sampling_seed":
        return isinstance(value, int) and -(2**63) <= value < 2**63
    if name == "received_time":
        return isinstance(value, int | float) and 0 <= value < 2**53
    return isinstance(value, int) and -(2**31) <= value <= INT32


_JSON = st.recursive(
    st.sampled_from([None, False, True, 0, 1, 5, 0.5, "", "a", *_EXTREMES]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["n", "top_k", "", "x"]), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(_names(GenerateReqInput))), _JSON, max_size=4))
def test_whatever_is_sent_is_taken_or_refused_by_name(fields: dict[str, Any]) -> None:
    request = _request(GenerateReqInput)
    for name, value in fields.items():
        setattr(request, name, value)
    refusal = _refusal(request)
    assert refusal is None or re.split(r"[:,.\[]", refusal)[0] in _names(GenerateReqInput)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": []}, "text: the list is empty"),
        ({"text": ["a", 5]}, r"text\[1\]"),
        ({"text": ["a", None]}, r"text\[1\]"),
        ({"text": ["a", ["b"]]}, r"text\[1\]"),
        ({"text": {"a": 1}}, "text: "),
        ({"text": "a", "input_ids": [1]}, "give one of the two"),
        ({"input_ids": []}, "input_ids: the list is empty"),
        ({"input_ids": [[1], 2]}, r"input_ids\[1\]"),
        ({"text": "x" * 101}, "--asyncep-max-prompt-chars"),
        ({"input_ids": [1] * 101}, "input_ids: 101 token ids"),
        ({"input_ids": [[1], [1] * 101]}, r"input_ids\[1\]: 101 token ids"),
        ({"text": ["a"] * 9}, "--asyncep-max-prompts"),
        ({"text": ["a"] * 4, "sampling_params": {"n": 3}}, "--asyncep-max-prompts"),
        ({"text": ["a", "b"], "token_ids_logprob": [[5]]}, "1 values for 2 prompts"),
        ({"text": ["a", "b"], "token_ids_logprob": [[5]] * 3}, "3 values for 2 prompts"),
        ({"text": ["a", "b"], "token_ids_logprob": [5, [6]]}, "token_ids_logprob"),
        ({"text": ["a", "b"], "token_ids_logprob": [[5], [512]]}, r"token_ids_logprob\[1\]: entry 0: 512"),
        ({"text": "a", "token_ids_logprob": [True]}, "entry 0: True"),
        ({"text": "a", "return_logprob": [True]}, "a list for a single prompt"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "1 values for 2 prompts"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "n must be the same"),
        ({"text": ["a", "b"], "rid": ["x"]}, "1 values for 2 prompts"),
        ({"text": "a", "rid": "HEALTH_CHECK_1"}, "the server's own"),
        ({"text": "a", "rid": "x\n"}, "printable"),
        ({"text": "a", "custom_logit_processor": "x"}, "cannot bring code"),
        ({"text": "a", "sampling_params": {"no_such": 1}}, "no sampling parameter of that name"),
        ({"text": "a", "sampling_params": {"is_normalized": True}}, "SGLang's own state"),
        ({"text": "a", "sampling_params": {"regex": "a+"}}, "nothing is decoded"),
        ({"text": "a", "sampling_params": {"logit_bias": {"512": 1}}}, "a token id of the vocabulary"),
        ({"text": "a", "top_logprobs_num": 1.0}, "a whole number"),
    ],
)
def test_refusals_name_field_and_fix(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_request(_request(GenerateReqInput, **fields), BOUNDS)


@pytest.mark.parametrize("cls", [GenerateReqInput, EmbeddingReqInput])
@pytest.mark.parametrize("empty", [[], {}, "", False, ()], ids=repr)
def test_what_is_not_served_reaches_no_rank_even_empty(cls: type, empty: Any) -> None:
    """An empty list in ``return_hidden_states`` once ended a rank."""
    stock = _request(cls)
    table = GENERATE if cls is GenerateReqInput else EMBEDDING
    for name in (name for name, rule in table.items() if isinstance(rule, Refused)):
        for prompts in ("a", ["a", "b"]):
            request = _request(cls, text=prompts, **{name: empty})
            assert _refusal(request) is None
            assert getattr(request, name) == getattr(stock, name), name
    rules = sampling(BOUNDS)
    refused = {name: empty for name, rule in rules.items() if isinstance(rule, Refused)}
    request = _request(cls, sampling_params={**refused, "max_new_tokens": 0})
    assert _refusal(request) is None
    assert request.sampling_params == {"max_new_tokens": 0}


def test_what_honest_clients_send_is_taken() -> None:
    fields: dict[str, Any] = {
        "text": ["a", "b"],
        "rid": ["x-1", "x-2"],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0, "top_k": -1, "stop": ["\n"], "n": 1},
        "return_logprob": [True, False],
        "logprob_start_len": -1,
        "top_logprobs_num": [0, 5],
        "token_ids_logprob": [[5, 6], None],
        "extra_key": "tenant",
        "priority": -1,
        "image_data": [],
        "modalities": [],
        "custom_labels": None,
    }
    assert check_request(_request(GenerateReqInput, **fields), BOUNDS) == 2


@given(st.integers(0, 200), st.integers(-1, 300), st.integers(0, 9), st.lists(st.integers(0, 5), max_size=4))
def test_the_size_of_an_answer(tokens: int, start: int, top: int, ids: list[int]) -> None:
    request = _request(
        GenerateReqInput, return_logprob=True, logprob_start_len=start, top_logprobs_num=top, token_ids_logprob=ids
    )
    values = answer_values(request, tokens)
    positions = len([p for p in range(tokens) if start >= 0 and p >= start]) + 1
    assert values >= positions * (1 + top + len(ids))
    request.return_logprob = False
    assert answer_values(request, tokens) == 0


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 500), st.booleans())
def test_ids_are_counted_for_each_prompt_and_sample_before_they_are_copied(
    prompts: int, samples: int, ids: int, nested: bool
) -> None:
    one = list(range(ids))
    request = _request(
        GenerateReqInput,
        text=["a"] * prompts,
        return_logprob=True,
        token_ids_logprob=[one] * prompts if nested else one,
        sampling_params={"max_new_tokens": 0, "n": samples},
    )
    if prompts * samples > BOUNDS.max_prompts:
        assert "--asyncep-max-prompts" in (_refusal(request) or "")
    elif prompts * samples * ids > BOUNDS.max_values:
        assert "--asyncep-max-logprobs" in (_refusal(request) or "")
    else:
        assert _refusal(request) is None
