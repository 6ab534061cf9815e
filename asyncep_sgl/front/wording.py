"""What an endpoint's callers call the fields that an error speaks of, and which entry of a list it means. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Names:
    """Fields of an endpoint.

    Attributes:
        text, ids: the prompt, as text and as token ids.
        tokens: how many tokens may be new.
        others: what else it calls differently, by SGLang's name.
    """

    text: str = "text"
    ids: str = "input_ids"
    tokens: str = "sampling_params.max_new_tokens"
    others: Mapping[str, str] = field(default_factory=dict)


NATIVE = Names()
# The fields that an error begins with, with commas between.
_FIELDS = re.compile(r"[a-z_.]+(?:, [a-z_.]+)*(?=[:\[])")
_OPENAI = {"min_new_tokens": "min_tokens", "sampling_seed": "seed"}
_CHAT = Names(
    *("messages", "messages", "max_completion_tokens (or max_tokens)"),
    {**_OPENAI, "top_logprobs_num": "top_logprobs"},
)
_OTHERS = {
    "/v1/completions": Names(
        *("prompt", "prompt", "max_tokens"), {**_OPENAI, "top_logprobs_num": "logprobs", "logprob_start_len": "echo"}
    ),
    "/v1/chat/completions": _CHAT,
    "/invocations": _CHAT,
    "/v1/messages": Names("messages", "messages", "max_tokens"),
    "/v1/responses": Names("input", "input", "max_output_tokens"),
    "/api/chat": Names("messages", "messages", "options.num_predict"),
    "/api/generate": Names("prompt", "prompt", "options.num_predict"),
    "/v1/score": Names("query, items", "query, items"),
    "/v1/rerank": Names("query, documents", "query, documents"),
    "/v1/embeddings": Names("input", "input"),
    "/v1/classify": Names("input", "input"),
}


def names_at(path: str) -> Names:
    """The fields of the endpoint at a path; SGLang's own where it has no others."""
    return _OTHERS.get(path, NATIVE)


def renamed(message: str, names: Names) -> str:
    """An error that speaks of SGLang's fields in the words of another endpoint."""
    found = _FIELDS.match(message)
    if names == NATIVE or found is None:
        return message
    said = dict.fromkeys(_renamed(field, names) for field in found[0].split(", "))
    return ", ".join(said) + message[found.end() :]


def _renamed(field: str, names: Names) -> str:
    if field == NATIVE.tokens:
        return names.tokens
    short = field.removeprefix("sampling_params.")
    return {**names.others, NATIVE.text: names.text, NATIVE.ids: names.ids}.get(short, short)


def placed(message: str, rid: str | None, rids: object, first: int) -> str:
    """An error with the entry of the list that it is about.

    Args:
        rid: of the request that has it.
        rids: of the list's requests, in order; anything else where there is no list.
        first: number of the first of them in the client's list.
    """
    if not isinstance(rids, Sequence) or isinstance(rids, str) or len(rids) < 2 or rid not in rids:
        return message
    return f"{message} (entry {first + list(rids).index(rid)} of the list, counted from 0)"
