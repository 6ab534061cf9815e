"""Errors in the words of the endpoint that was called, with the entry of the list that they are about."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep_sgl.front.sglang_flags import refuse_truncation
from asyncep_sgl.front.validation import check_prefill_only, check_prompt
from asyncep_sgl.front.wording import NATIVE, Names, names_at, placed, renamed


@pytest.mark.parametrize(
    ("path", "prompt", "tokens"),
    [
        ("/generate", "text", "sampling_params.max_new_tokens"),
        ("/v1/completions", "prompt", "max_tokens"),
        ("/v1/chat/completions", "messages", "max_completion_tokens (or max_tokens)"),
        ("/v1/responses", "input", "max_output_tokens"),
        ("", "text", "sampling_params.max_new_tokens"),
    ],
)
def test_fields_are_called_as_the_endpoint_calls_them(path: str, prompt: str, tokens: str) -> None:
    names = names_at(path)
    with pytest.raises(ValueError, match=rf"^{prompt}: the prompt is empty"):
        check_prompt([], 10, None, names)
    with pytest.raises(ValueError, match=rf"^{prompt}: the prompt has 4 tokens, .* leaves room for 3; shorten it$"):
        check_prompt([1, 2, 3, 4], 10, 3, names)
    with pytest.raises(ValueError, match=f"^{names.ids}: the prompt has 4 tokens"):
        check_prompt([1, 2, 3, 4], 10, 3, names, given_as_ids=True)
    check_prompt([1, 2, 3], 10, 3, names)
    where = r"input_ids\[1\]" if names == NATIVE else f"{prompt}: token 1 of the prompt"
    with pytest.raises(ValueError, match=rf"^{where}: token id 10 is outside the vocabulary \[0, 10\)$"):
        check_prompt([1, 10], 10, None, names)
    for wrong in (None, 2, -1, True, "1"):
        with pytest.raises(ValueError, match=f"^{re.escape(tokens)}: "):
            check_prefill_only({} if wrong is None else {"max_new_tokens": wrong}, names.tokens)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("sampling_params.max_new_tokens: -1 is wrong", "max_tokens: -1 is wrong"),
        ("sampling_params.temperature: 5000", "temperature: 5000"),
        ("text[1]: too long", "prompt[1]: too long"),
        ("text, input_ids: give one", "prompt: give one"),
        ("sampling_params.min_new_tokens: -1", "min_tokens: -1"),
        ("sampling_params.sampling_seed: -1", "seed: -1"),
        ("top_logprobs_num: 5000", "logprobs: 5000"),
        ("logprob_start_len, token_ids_logprob, top_logprobs_num: over", "echo, token_ids_logprob, logprobs: over"),
        ("input_ids[3]: 'a'", "prompt[3]: 'a'"),
        ("priority: 5", "priority: 5"),
        ("texts are none", "texts are none"),
    ],
)
def test_other_errors_are_renamed(message: str, said: str) -> None:
    assert renamed(message, names_at("/v1/completions")) == said
    assert renamed(message, names_at("/generate")) == message


def test_prompts_as_ids_are_called_so() -> None:
    with pytest.raises(ValueError, match=r"^input_ids\[0\]: -1 is|^input_ids\[0\]: token id -1"):
        check_prompt([-1], 10, None, Names())


@given(st.integers(2, 50), st.integers(0, 1000), st.data())
def test_the_entry_is_the_clients(count: int, first: int, data: st.DataObject) -> None:
    rids = [f"r{i}" for i in range(count)]
    number = data.draw(st.integers(0, count - 1))
    assert placed("no", rids[number], rids, first) == f"no (entry {first + number} of the list, counted from 0)"
    for single in (None, "r0", ["r0"]):
        assert placed("no", "r0", single, 0) == "no"
    assert placed("no", "other", rids, 0) == "no"


def test_cutting_in_silence_is_refused() -> None:
    refuse_truncation(SimpleNamespace(allow_auto_truncate=False))
    with pytest.raises(SystemExit, match="--allow-auto-truncate: it cuts off a prompt's end"):
        refuse_truncation(SimpleNamespace(allow_auto_truncate=True))
