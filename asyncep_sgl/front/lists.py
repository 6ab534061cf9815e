"""Long lists of prompts are served in parts, so that the front's event loop gets to others in between.

SGLang makes the requests of a list in one go: for 10,000 prompts that is seconds in which nobody else is heard. Here a
list becomes parts of a few prompts each, one after another prepared and sent on, and all waited for together. Answers
are the list's, in its order. A list that asks for anything out of the ordinary is left whole.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import MISSING, fields
from typing import Any

# Ten milliseconds of work or so.
PART_PROMPTS = 64

# One value for all prompts, or a list with one for each.
_EACH = frozenset(
    {
        "rid",
        "text",
        "input_ids",
        "sampling_params",
        "return_logprob",
        "logprob_start_len",
        "top_logprobs_num",
        "token_ids_logprob",
        "lora_path",
        "extra_key",
        "cache_salt",
    }
)
# One value for all prompts.
_SHARED = frozenset(
    {
        "return_text_in_logprobs",
        "log_metrics",
        "routed_dp_rank",
        "data_parallel_rank",
        "http_worker_ipc",
        "priority",
        "no_logs",
        "background",
        "external_trace_header",
        "received_time",
        "return_prompt_token_ids",
    }
)


def parts(request: Any) -> list[Any] | None:
    """The parts of a ``GenerateReqInput`` as it came, None if it is short, no list, or not to be cut.

    What is wrong with a list is SGLang's to say: whatever does not fit is left whole.
    """
    count = _count(request)
    if count <= PART_PROMPTS or not _ordinary(request, count):
        return None
    if isinstance(request.rid, list) and len(set(request.rid)) != count:
        return None
    return list(_cut(request, count))


async def served(some: list[Any], serve: Callable[[Any], AsyncGenerator[Any, None]]) -> AsyncGenerator[Any, None]:
    """Yields the one answer to a list.

    Args:
        some: the list's parts.
        serve: yields the one answer, a list, to a part.
    """

    async def answer(part: Any) -> Any:
        stream = serve(part)
        try:
            return await anext(stream)
        finally:
            await stream.aclose()

    tasks: list[asyncio.Task[Any]] = []
    try:
        for part in some:
            tasks.append(asyncio.create_task(answer(part)))
            # Its first step, up to where it waits for ranks; then whatever else is ready.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if tasks[-1].done() and tasks[-1].exception() is not None:
                break
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    yield [answer for part in answers for answer in part]


def _count(request: Any) -> int:
    """Prompts of a plain list, else 0."""
    text, ids = getattr(request, "text", None), getattr(request, "input_ids", None)
    if isinstance(text, list) and ids is None:
        return len(text)
    if isinstance(ids, list) and text is None and ids and all(isinstance(prompt, list) for prompt in ids):
        return len(ids)
    return 0


def _ordinary(request: Any, count: int) -> bool:
    for field in fields(request):
        value = getattr(request, field.name)
        if field.name in _SHARED or value is None:
            continue
        if field.name in _EACH:
            if _is_each(field.name, value) and len(value) != count:
                return False
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value != default:
            return False
    sampling = request.sampling_params
    for entry in sampling if isinstance(sampling, list) else [sampling]:
        if entry is not None and (not isinstance(entry, dict) or entry.get("n", 1) != 1 or "beam_width" in entry):
            return False
    return True


def _is_each(name: str, value: Any) -> bool:
    """Whether a field has a value for each prompt."""
    if name == "token_ids_logprob":
        return isinstance(value, list) and any(isinstance(entry, list) or entry is None for entry in value)
    return isinstance(value, list)


def _cut(request: Any, count: int) -> Iterator[Any]:
    each = {name: value for name in _EACH if _is_each(name, value := getattr(request, name))}
    if isinstance(request.rid, str):
        # As SGLang numbers them itself.
        each["rid"] = [f"{request.rid}_{index}" for index in range(count)]
    for start in range(0, count, PART_PROMPTS):
        part = copy.copy(request)
        for name, values in each.items():
            setattr(part, name, values[start : start + PART_PROMPTS])
        yield part
