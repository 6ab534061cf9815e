"""Long texts in a thread give the tokens they always gave, and leave the event loop free."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.entrypoints.openai.protocol import TokenizeRequest
from sglang.srt.entrypoints.openai.serving_tokenize import OpenAIServingTokenize
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from tiny_models import tokenizer

from asyncep_sgl.front import tokenizing

TEXT = "How a request finds its rank. "


class Manager(TokenizerManager):  # type: ignore[misc] # upstream is untyped
    """SGLang's, with what tokenizing needs."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.async_dynamic_batch_tokenizer = None
        self.model_config = SimpleNamespace(is_embedding_gemma=False, context_len=4096)
        self.threads: set[str] = set()


@pytest.fixture(scope="module")
def manager() -> Manager:
    return Manager()


async def upstream(manager: Manager, texts: Any, is_cross_encoder: bool = False) -> Any:
    manager.threads.add(threading.current_thread().name)
    return await TokenizerManager._tokenize_texts(manager, texts, is_cross_encoder)


@pytest.mark.parametrize(
    "texts",
    [
        TEXT,
        TEXT * 1000,
        [TEXT * 1000],
        [TEXT * number for number in range(1, 400)],
        [TEXT * 20_000, "short", TEXT * 10_000, TEXT],
    ],
)
def test_tokens_are_those_of_sglang_and_long_texts_are_not_tokenized_on_the_loop(manager: Manager, texts: Any) -> None:
    expected = asyncio.run(upstream(manager, texts))
    manager.threads.clear()
    assert asyncio.run(tokenizing.tokenize(upstream, manager, texts)) == expected
    on_loop = threading.current_thread().name in manager.threads
    assert on_loop == (tokenizing.characters(texts) <= tokenizing.SHORT_CHARACTERS)


def test_pairs_of_a_cross_encoder_stay_together(manager: Manager) -> None:
    pairs = [[TEXT, TEXT * 500], [TEXT, TEXT]]
    expected = asyncio.run(upstream(manager, pairs, True))
    assert asyncio.run(tokenizing.tokenize(upstream, manager, pairs, True)) == expected


def test_long_and_short_texts_at_once(manager: Manager) -> None:
    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(tokenizing.tokenize(upstream, manager, text) for text in texts))

    texts = [TEXT * (2000 if number % 2 else 1) for number in range(20)]
    expected = [asyncio.run(upstream(manager, text)) for text in texts]
    assert asyncio.run(all_at_once()) == expected


def test_the_loop_goes_on_while_a_long_text_is_tokenized(manager: Manager) -> None:
    async def run() -> int:
        task = asyncio.ensure_future(tokenizing.tokenize(upstream, manager, TEXT * 30_000))
        turns = 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        await task
        return turns

    assert asyncio.run(run()) > 3  # tokenized on the loop it is one


@given(st.lists(st.integers(0, 3 * tokenizing.SLICE_CHARACTERS // 2), max_size=12))
@settings(max_examples=30, deadline=None)
def test_slices_hold_all_texts_in_order_and_none_too_many(lengths: list[int]) -> None:
    texts = ["x" * length for length in lengths]
    found = list(tokenizing.slices(texts))
    assert [text for part in found for text in part] == texts
    assert all(part for part in found)
    assert all(len(part) == 1 or sum(map(len, part)) <= tokenizing.SLICE_CHARACTERS for part in found)


def _asked(length: int) -> Any:
    return SimpleNamespace(headers={"content-length": str(length)})


@pytest.mark.parametrize("much", [1, 5000])
def test_endpoints_that_tokenize_answer_as_ever_and_long_requests_are_not_done_on_the_loop(
    manager: Manager, much: int
) -> None:
    async def endpoint(serving: OpenAIServingTokenize, *requests: Any) -> Any:
        threads.add(threading.current_thread().name)
        return await OpenAIServingTokenize._handle_non_streaming_request(serving, *requests)

    serving = OpenAIServingTokenize.__new__(OpenAIServingTokenize)
    serving.tokenizer_manager, serving.chat_serving = manager, None
    threads: set[str] = set()
    for prompt in (TEXT * much, [TEXT * much, TEXT]):
        request = TokenizeRequest(prompt=prompt)
        expected = asyncio.run(endpoint(serving, request, request, None))
        threads.clear()
        found = asyncio.run(tokenizing.answer(endpoint, serving, request, request, _asked(len(TEXT) * much)))
        assert found == expected
        assert found.count
        assert (threading.current_thread().name in threads) == (much == 1)


def test_a_chat_s_twin_has_the_thread_s_tokenizer_everywhere(manager: Manager) -> None:
    async def endpoint(serving: Any, _: Any) -> Any:
        return serving.openai_serving_chat.tokenizer_manager.tokenizer

    serving = SimpleNamespace(openai_serving_chat=SimpleNamespace(tokenizer_manager=manager))
    found = asyncio.run(tokenizing.answer(endpoint, serving, _asked(1_000_000)))
    assert found is not manager.tokenizer
    assert serving.openai_serving_chat.tokenizer_manager is manager
    assert asyncio.run(tokenizing.answer(endpoint, serving, _asked(10))) is manager.tokenizer
