"""`/v1/score`: every item becomes a prompt of its own, placed by its tokens, scored from its log-probabilities.

The same steps that SGLang's server takes (sglang/srt/managers/tokenizer_manager_score_mixin.py, 0.5.23), done
here, so that a rank can be named for each item (`/v1/score` has no field for it) and items of one query may
go to several ranks. Whatever is out of the ordinary is forwarded to a worker as it is.
"""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Any

import orjson

from asyncep_router.http.generate import GenerateBatch
from asyncep_router.http.plans import Plan, Prompt, encode, plan_opaque

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncep_router.http.tokenizer import Tokenizer

# What takes more characters or ids than this is left to a worker as it is, and so are more labels of all items.
_MOST = 1 << 24
_MOST_LABELS = 1 << 20

_KNOWN = frozenset(
    {
        "query",
        "items",
        "label_token_ids",
        "apply_softmax",
        "temperature",
        "return_token_logprobs",
        "item_first",
        "model",
    }
)


async def plan_score(raw: bytes, fields: dict[str, Any], tokenizer: Tokenizer | None, *, plain: bool) -> Plan:
    """The plan for a body, parsed into `fields`. `plain`: the workers score item by item with a generating model."""
    simple = plain and _ordinary(fields) and _size(fields) <= _MOST and _count(fields) <= _MOST_LABELS
    labels = _labels(fields, tokenizer.vocabulary if tokenizer else None) if simple else None
    if labels is not None:
        prompts = await _prompts(fields, tokenizer)
        if prompts is not None and all(prompts):
            return Score(fields, prompts, labels)
    return plan_opaque("/v1/score", raw, fields)


def _size(fields: dict[str, Any]) -> int:
    """Characters or token ids of all prompts. The query counts once for each item: a small body can ask for very
    much."""
    query, items = fields.get("query"), fields.get("items")
    if not isinstance(items, str | list) or not isinstance(query, str | list | None):
        return 0
    entries = [items] if isinstance(items, str) else items
    own = sum(len(entry) for entry in entries if isinstance(entry, str | list))
    return own + len(query or "") * len(entries)


def _count(fields: dict[str, Any]) -> int:
    """Label ids of all items."""
    items, labels = fields.get("items"), fields.get("label_token_ids")
    if not isinstance(labels, list):
        return 0
    nested = sum(len(row) for row in labels if isinstance(row, list))
    return nested or len(labels) * (len(items) if isinstance(items, list) else 1)


def _ordinary(fields: dict[str, Any]) -> bool:
    if any(key not in _KNOWN and value is not None and value is not False for key, value in fields.items()):
        return False
    flags = ("apply_softmax", "item_first", "return_token_logprobs")
    if any(type(fields.get(key, False)) is not bool for key in flags):
        return False
    temperature = fields.get("temperature", 1.0)
    if type(temperature) not in (int, float) or not math.isfinite(temperature) or temperature <= 0:
        return False
    if temperature != 1 and not fields.get("apply_softmax"):
        return False
    return isinstance(fields.get("model", ""), str)


def _labels(fields: dict[str, Any], vocabulary: int | None) -> list[list[int]] | None:
    """Labels of each item, None if a worker would have something to say about them."""
    labels, items = fields.get("label_token_ids"), fields.get("items")
    if (
        vocabulary is None
        or not isinstance(labels, list)
        or not isinstance(items, str | list)
        or not (labels and items)
    ):
        return None
    count = 1 if isinstance(items, str) else len(items)
    shared = not isinstance(labels[0], list)
    rows = [labels] * count if shared else labels
    if len(rows) != count:
        return None
    for row in rows[:1] if shared else rows:
        if not isinstance(row, list) or not row or len(set(map(str, row))) != len(row):
            return None
        if any(type(token) is not int or not 0 <= token < vocabulary for token in row):
            return None
    return rows


async def _prompts(fields: dict[str, Any], tokenizer: Tokenizer | None) -> list[array[int]] | None:
    query, items = fields.get("query"), fields["items"]
    first = bool(fields.get("item_first"))
    if isinstance(items, str):
        items = [items]
    if not isinstance(items, list):
        return None
    if all(isinstance(item, str) for item in items) and isinstance(query, str | None):
        start = query or ""
        return await encode(tokenizer, [item + start if first else start + item for item in items])
    if all(isinstance(item, list) for item in items) and isinstance(query, list | None):
        ids = query or []
        try:
            return [array("q", item + ids if first else ids + item) for item in items]
        except (TypeError, OverflowError):
            return None
    return None


class Score(GenerateBatch):
    """Items as prompts of `/generate`; the answers become scores."""

    def __init__(self, fields: dict[str, Any], prompts: Sequence[array[int]], labels: list[list[int]]) -> None:
        body = {
            "input_ids": [list(prompt) for prompt in prompts],
            "token_ids_logprob": labels,
            "return_logprob": True,
            "logprob_start_len": -1,
            "sampling_params": {"max_new_tokens": 0},
        }
        super().__init__(body, [Prompt(prompt) for prompt in prompts])
        self._labels = labels
        self._softmax = bool(fields.get("apply_softmax"))
        self._temperature = float(fields.get("temperature", 1.0))
        model = fields.get("model")
        self._model = model if isinstance(model, str) else "default"
        self._return_logprobs = bool(fields.get("return_token_logprobs"))

    def merge(self, answers: Sequence[Any]) -> bytes:
        scores, raw, tokens = [], [], 0
        for answer, labels in zip(answers, self._labels, strict=True):
            meta = answer["meta_info"]
            tokens += meta.get("prompt_tokens", 0)
            wanted = set(labels)
            found = {token: value for value, token, _ in meta["output_token_ids_logprobs"][0] if token in wanted}
            scores.append(
                score_row([found.get(token, -math.inf) for token in labels], self._softmax, self._temperature)
            )
            raw.append([found.get(token) for token in labels])
        return orjson.dumps(
            {
                "scores": scores,
                "pooled_hidden_states": None,
                "token_logprobs": raw if self._return_logprobs else None,
                "model": self._model,
                "usage": {
                    "prompt_tokens": tokens,
                    "total_tokens": tokens,
                    "completion_tokens": 0,
                    "prompt_tokens_details": None,
                    "reasoning_tokens": 0,
                    "completion_tokens_details": None,
                },
                "object": "scoring",
            }
        )


def score_row(logprobs: Sequence[float], softmax: bool, temperature: float) -> list[float]:
    """Scores of one item's labels: their probabilities, or those among the labels alone."""
    if not softmax:
        return [math.exp(value) for value in logprobs]
    top = max(logprobs)
    weights = [math.exp((value - top) / temperature) for value in logprobs]
    total = sum(weights)
    return [weight / total for weight in weights]
