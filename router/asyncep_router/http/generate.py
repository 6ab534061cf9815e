"""`/generate`: a prompt, or a list of them that is split over ranks and merged in order."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import orjson

from asyncep_router.http.plans import Forward, Plan, Prompt, as_prompt, bytes_prompt, common, encode, written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncep_router.http.tokenizer import Tokenizer

# Fields of a batch with one value for all prompts.
_SHARED = frozenset({"stream", "return_text_in_logprobs", "log_metrics", "priority"})
# Fields that are one value for all prompts, or a list with one for each.
_EACH = frozenset(
    {"rid", "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "lora_path", "extra_key"}
)
# Ids for all prompts, or a list with ids for each.
_IDS = "token_ids_logprob"
_PROMPTS = frozenset({"input_ids", "text"})
# With any of these a worker does more to a prompt than tokenize it.
_BEYOND_TEXT = ("input_embeds", "image_data", "video_data", "audio_data", "session_params")


async def plan_generate(raw: bytes, fields: dict[str, Any], tokenizer: Tokenizer | None) -> Plan:
    """The plan for a body, parsed into `fields`. What is not understood is forwarded: the worker says what is wrong."""
    ids, text = fields.get("input_ids"), fields.get("text")
    if ids is not None and text is None:
        single = as_prompt(ids, _logits(fields, len(ids))) if isinstance(ids, list) else None
        if single is not None:
            return Forward("/generate", raw, single, fields, pinnable=True)
        if isinstance(ids, list) and ids:
            many = [as_prompt(entry) for entry in ids]
            prompts = [prompt for prompt in many if prompt is not None]
            if len(prompts) == len(many):
                return _batch(raw, fields, prompts)
    elif text is not None and ids is None and not any(fields.get(key) for key in _BEYOND_TEXT):
        if isinstance(text, str):
            found = await encode(tokenizer, [text])
            if found and found[0]:
                return _tokenized(fields, found[0])
        elif isinstance(text, list) and text and all(isinstance(entry, str) for entry in text):
            found = await encode(tokenizer, text)
            if found and all(found):
                fields = {key: value for key, value in fields.items() if key != "text"}
                fields["input_ids"] = [list(entry) for entry in found]
                return _batch(written(fields), fields, [Prompt(entry) for entry in found])
    guide = text.encode() if isinstance(text, str) else raw
    return Forward("/generate", raw, bytes_prompt(guide), fields, pinnable=True)


def _tokenized(fields: dict[str, Any], ids: array[int]) -> Plan:
    fields = {key: value for key, value in fields.items() if key != "text"}
    fields["input_ids"] = list(ids)
    return Forward("/generate", written(fields), Prompt(ids, _logits(fields, len(ids))), fields, pinnable=True)


def _logits(fields: dict[str, Any], length: int) -> int:
    start = fields.get("logprob_start_len")
    if fields.get("return_logprob") and type(start) is int and 0 <= start < length:
        return length - start
    return 1


def _batch(raw: bytes, fields: dict[str, Any], prompts: list[Prompt]) -> Plan:
    if splittable(fields, len(prompts)):
        return GenerateBatch(fields, prompts)
    # As a whole to one rank, which sees the sum of the prompts.
    together = array("q")
    for prompt in prompts:
        together.extend(prompt.token_ids)
    return Forward("/generate", raw, Prompt(together, len(prompts)), fields, pinnable=True)


def splittable(fields: dict[str, Any], count: int) -> bool:
    """Whether a batch can be cut into parts whose answers, in order, are the batch's answer."""
    if fields.get("stream") or common(fields, True)[2] is not None:
        return False
    sampling = fields.get("sampling_params")
    for entry in sampling if isinstance(sampling, list) else [sampling]:
        if entry is not None and (not isinstance(entry, dict) or entry.get("n", 1) != 1):
            return False
    return all(
        value is None
        or key in _PROMPTS
        or (key in _SHARED and not isinstance(value, list | dict))
        or (key in (*_EACH, _IDS) and (not _is_each(key, value) or len(value) == count))
        for key, value in fields.items()
    )


def _is_each(key: str, value: Any) -> bool:
    """Whether a field has a value for each prompt."""
    if key == _IDS:
        return isinstance(value, list) and any(isinstance(entry, list) for entry in value)
    return key in _EACH and isinstance(value, list)


class GenerateBatch:
    """A list of prompts; every rank gets those placed there as a list."""

    path = "/generate"
    joined = True
    stream = False
    pinned: int | None = None

    def __init__(self, fields: dict[str, Any], prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self.priority, self.namespace, _ = common(fields, True)
        self._ids: list[list[int]] = fields["input_ids"]
        self._shared: dict[str, Any] = {}
        self._each: dict[str, list[Any]] = {}
        for key, value in fields.items():
            if key in _PROMPTS or value is None:
                continue
            if key == "rid" and isinstance(value, str):
                # SGLang numbers them like this itself; cut up, the numbers must still be the batch's.
                self._each[key] = [f"{value}_{index}" for index in range(len(prompts))]
            elif _is_each(key, value):
                self._each[key] = value
            else:
                self._shared[key] = value

    def body(self, indices: Sequence[int], dp_rank: int | None) -> bytes:
        part = {**self._shared, "input_ids": [self._ids[index] for index in indices]}
        for key, values in self._each.items():
            part[key] = [values[index] for index in indices]
        if dp_rank is not None:
            part["routed_dp_rank"] = dp_rank
        return written(part)

    def read(self, reply: bytes, count: int) -> list[Any]:
        answers = orjson.loads(reply)
        if not isinstance(answers, list) or len(answers) != count:
            raise ValueError(f"{count} prompts were sent, the worker's answer is not a list of as many")
        return answers

    def merge(self, answers: Sequence[Any]) -> bytes:
        return orjson.dumps(list(answers))
