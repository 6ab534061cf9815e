"""A long list in parts asks for what the list asked for, and is answered as it would be."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import GenerateReqInput

from asyncep_sgl.front.lists import PART_PROMPTS, parts, served

COUNT = st.integers(PART_PROMPTS + 1, 3 * PART_PROMPTS + 1)


def one_or_each(values: st.SearchStrategy[Any], count: int) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), values, st.lists(values, min_size=count, max_size=count))


@st.composite
def long_lists(draw: st.DrawFn) -> GenerateReqInput:
    count = draw(COUNT)
    prompts: dict[str, Any] = (
        {"text": [f"text {n}" for n in range(count)]}
        if draw(st.booleans())
        else {"input_ids": [[n, n + 1] for n in range(count)]}
    )
    ids = st.lists(st.integers(0, 9), min_size=1, max_size=3)
    nested = st.lists(ids, min_size=count, max_size=count)
    return GenerateReqInput(
        **prompts,
        rid=draw(st.sampled_from(["mine", [f"r{n}" for n in range(count)]])),
        sampling_params=draw(one_or_each(st.just({"max_new_tokens": 0}), count)),
        return_logprob=draw(one_or_each(st.booleans(), count)),
        logprob_start_len=draw(one_or_each(st.integers(-1, 3), count)),
        top_logprobs_num=draw(one_or_each(st.integers(0, 3), count)),
        token_ids_logprob=draw(st.one_of(st.none(), ids, nested)),
        extra_key=draw(one_or_each(st.sampled_from(["a", "b"]), count)),
        cache_salt=draw(one_or_each(st.sampled_from(["a", "b"]), count)),
        priority=draw(st.sampled_from([None, -1])),
        routed_dp_rank=draw(st.sampled_from([None, 1])),
        return_text_in_logprobs=draw(st.booleans()),
        http_worker_ipc="a mark",
    )


def asked(request: GenerateReqInput) -> list[dict[str, Any]]:
    """What SGLang makes of it, prompt by prompt."""
    request = copy.deepcopy(request)
    request.normalize_batch_and_arguments()
    return [
        {field.name: getattr(request[index], field.name) for field in fields(GenerateReqInput)}
        for index in range(request.batch_size)
    ]


@given(long_lists())
@settings(max_examples=60, deadline=None)
def test_the_parts_ask_for_what_the_list_asks_for(request_: GenerateReqInput) -> None:
    some = parts(request_)
    assert some is not None
    assert len(some) > 1
    assert [each for part in some for each in asked(part)] == asked(request_)


@pytest.mark.parametrize(
    "odd",
    [
        {"stream": True},
        {"sampling_params": {"n": 2}},
        {"sampling_params": [{"n": 1}] * 199 + [{"n": 2}]},
        {"sampling_params": "none"},
        {"image_data": "picture"},
        {"session_params": {"id": "s"}},
        {"return_hidden_states": True},
        {"custom_logit_processor": "code"},
        {"return_logprob": [True] * 3},
        {"token_ids_logprob": [[5]]},
        {"rid": ["same"] * 200},
        {"rid": ["r"]},
        {"kv_hints": [{}] * 200},
        {"input_embeds": [[[0.0]]] * 200},
    ],
)
def test_what_is_out_of_the_ordinary_is_left_whole(odd: dict[str, Any]) -> None:
    assert parts(GenerateReqInput(input_ids=[[1]] * 200, **odd)) is None


@pytest.mark.parametrize(
    "prompts",
    [
        {"text": "one"},
        {"text": ["a"] * PART_PROMPTS},
        {"input_ids": [1] * 1000},
        {"input_ids": []},
        {"input_ids": [[1], 2] * 100},
        {"text": ["a"] * 100, "input_ids": [[1]] * 100},
    ],
)
def test_short_lists_and_what_is_none_are_left_whole(prompts: dict[str, Any]) -> None:
    assert parts(GenerateReqInput(**prompts)) is None


class Server:
    """Answers parts in its own order; says who is under way."""

    def __init__(self, fails: int | None = None) -> None:
        self.begun: list[int] = []
        self.open = 0
        self.fails = fails
        self.go = asyncio.Event()

    async def serve(self, part: list[int]) -> AsyncGenerator[list[int], None]:
        self.begun.append(part[0])
        self.open += 1
        try:
            if part[0] == self.fails:
                raise ValueError("a bad prompt")
            await self.go.wait()
            yield [10 * each for each in part]
        finally:
            self.open -= 1


async def the_answer(server: Server, some: list[list[int]]) -> Any:
    async for answer in served(some, server.serve):
        return answer


def test_answers_are_in_order_and_others_get_a_turn_between_parts() -> None:
    async def run() -> None:
        server = Server()
        task = asyncio.create_task(the_answer(server, [[0, 1], [2, 3], [4]]))
        most_at_once = 0
        while len(server.begun) < 3:
            before = len(server.begun)
            await asyncio.sleep(0)
            most_at_once = max(most_at_once, len(server.begun) - before)
        assert most_at_once == 1
        server.go.set()
        assert await task == [0, 10, 20, 30, 40]
        assert server.open == 0

    asyncio.run(run())


def test_a_bad_part_ends_the_list_and_frees_the_others() -> None:
    async def run() -> None:
        server = Server(fails=2)
        with pytest.raises(ValueError, match="a bad prompt"):
            await the_answer(server, [[0, 1], [2, 3], [4]])
        assert server.begun == [0, 2]
        assert server.open == 0

    asyncio.run(run())


def test_a_client_that_leaves_ends_all_parts() -> None:
    async def run() -> None:
        server = Server()
        task = asyncio.create_task(the_answer(server, [[0], [1], [2]]))
        while len(server.begun) < 2:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert server.open == 0

    asyncio.run(run())
