"""Long texts are tokenized in a thread, so that the front's event loop answers others meanwhile.

A tokenizer of Hugging Face's must not be used by two threads at once ("Already borrowed"), so the thread has a copy of
its own. There is one thread: who sends much waits for others who do. Lists go through it in slices, so that they take
turns.
"""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

# Some five milliseconds on a slow core.
SHORT_CHARACTERS = 10_000
SLICE_CHARACTERS = 200_000

Step = Callable[..., Coroutine[Any, Any, Any]]
"""A coroutine function of SGLang's that never waits for anything."""
# Where SGLang's endpoints for conversations keep the one that makes prompts of them.
_CHATS = ("chat_serving", "openai_serving_chat")

_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
_twins: dict[int, Any] = {}


async def tokenize(original: Step, manager: Any, texts: Any, is_cross_encoder: bool = False) -> tuple[Any, Any]:
    """As `original`, ``TokenizerManager._tokenize_texts``, in the thread if the texts are long."""
    if (
        manager.async_dynamic_batch_tokenizer is not None
        or not getattr(manager.tokenizer, "is_fast", False)
        or characters(texts) <= SHORT_CHARACTERS
    ):
        return cast(tuple[Any, Any], await original(manager, texts, is_cross_encoder))
    own = functools.partial(_twin, manager)
    run = asyncio.get_running_loop().run_in_executor
    if isinstance(texts, str) or is_cross_encoder:
        return cast(tuple[Any, Any], await run(_thread, _finished, original, own, texts, is_cross_encoder))
    found: list[Any] = []
    for part in slices(texts):
        ids, _ = await run(_thread, _finished, original, own, part, is_cross_encoder)
        found += ids
    return found, None


def characters(texts: Any) -> int:
    """Of a text, or of all texts in lists of lists."""
    if isinstance(texts, str):
        return len(texts)
    return sum(map(characters, texts)) if isinstance(texts, list | tuple) else 0


def slices(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, each slice as many as make `SLICE_CHARACTERS`, at least one."""
    filled = 0
    some: list[str] = []
    for text in texts:
        if some and filled + len(text) > SLICE_CHARACTERS:
            yield some
            some, filled = [], 0
        some.append(text)
        filled += len(text)
    if some:
        yield some


async def answer(original: Step, serving: Any, *requests: Any) -> Any:
    """As `original`, an endpoint that tokenizes or detokenizes, in the thread if the request is long.

    Args:
        serving: SGLang's object of the endpoint.
        requests: what `original` takes, the HTTP request last.
    """
    chat = next((each for name in _CHATS if (each := getattr(serving, name, None)) is not None), serving)
    length = requests[-1].headers.get("content-length", "")
    if not getattr(chat.tokenizer_manager.tokenizer, "is_fast", False) or (
        length.isdecimal() and int(length[:20]) <= SHORT_CHARACTERS
    ):
        return await original(serving, *requests)
    own = functools.partial(_serving_twin, serving, chat.tokenizer_manager)
    return await asyncio.get_running_loop().run_in_executor(_thread, _finished, original, own, *requests)


def _serving_twin(serving: Any, manager: Any) -> Any:
    return _with_manager(serving, _twin(manager))


def _with_manager(serving: Any, manager: Any) -> Any:
    twin = copy.copy(serving)
    if hasattr(twin, "tokenizer_manager"):
        twin.tokenizer_manager = manager
    for name in _CHATS:
        if getattr(twin, name, None) is not None:
            setattr(twin, name, _with_manager(getattr(twin, name), manager))
    return twin


def _twin(manager: Any) -> Any:
    """A manager like this one with a tokenizer that only the thread uses."""
    twin = _twins.get(id(manager.tokenizer))
    if twin is None:
        twin = copy.copy(manager)
        twin.tokenizer = copy.deepcopy(manager.tokenizer)
        _twins.clear()
        _twins[id(manager.tokenizer)] = twin
    return twin


def _finished(original: Step, own: Callable[[], Any], *arguments: Any) -> Any:
    """Runs in the thread: the coroutine's result, on what the thread has of its own."""
    step = original(own(), *arguments)
    try:
        step.send(None)
    except StopIteration as end:
        return end.value
    step.close()
    raise RuntimeError("SGLang's tokenizing waits for something; it cannot run in a thread")
