"""Long texts are tokenized in a thread, so that the front's event loop answers others meanwhile.

A tokenizer of Hugging Face's must not be used by two threads at once ("Already borrowed"), so the thread has a copy of
its own. There is one thread: who sends much waits for others who do. Lists go through it in slices, so that they take
turns.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Some five milliseconds on a slow core.
SHORT_CHARACTERS = 10_000
SLICE_CHARACTERS = 200_000

Tokenize = Callable[..., Coroutine[Any, Any, tuple[Any, Any]]]
"""``TokenizerManager._tokenize_texts``."""

_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
_twins: dict[int, Any] = {}


async def tokenize(original: Tokenize, manager: Any, texts: Any, is_cross_encoder: bool = False) -> tuple[Any, Any]:
    """As `original`, which never waits for anything, in the thread if the texts are long."""
    if (
        manager.async_dynamic_batch_tokenizer is not None
        or not getattr(manager.tokenizer, "is_fast", False)
        or characters(texts) <= SHORT_CHARACTERS
    ):
        return await original(manager, texts, is_cross_encoder)
    run = asyncio.get_running_loop().run_in_executor
    if isinstance(texts, str) or is_cross_encoder:
        return await run(_thread, _finished, original, manager, texts, is_cross_encoder)
    found: list[Any] = []
    for part in slices(texts):
        ids, _ = await run(_thread, _finished, original, manager, part, is_cross_encoder)
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


def _finished(original: Tokenize, manager: Any, texts: Any, is_cross_encoder: bool) -> tuple[Any, Any]:
    """Runs in the thread: the coroutine's result, on a twin of the manager that has a tokenizer of its own."""
    twin = _twins.get(id(manager.tokenizer))
    if twin is None:
        twin = copy.copy(manager)
        twin.tokenizer = copy.deepcopy(manager.tokenizer)
        _twins.clear()
        _twins[id(manager.tokenizer)] = twin
    step = original(twin, texts, is_cross_encoder)
    try:
        step.send(None)
    except StopIteration as end:
        result: tuple[Any, Any] = end.value
        return result
    step.close()
    raise RuntimeError("SGLang's tokenizing waits for something; it cannot run in a thread")
