"""What an endpoint's callers call the fields that an error speaks of, and which entry of a list it means. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """Fields of an endpoint.

    Attributes:
        text, ids: the prompt, as text and as token ids.
        tokens: how many tokens may be new.
    """

    text: str = "text"
    ids: str = "input_ids"
    tokens: str = "sampling_params.max_new_tokens"


NATIVE = Names()
_FIELD = re.compile(r"text\b|input_ids\b|sampling_params\.\w+")
_OTHERS = {
    "/v1/completions": Names("prompt", "prompt", "max_tokens"),
    "/v1/chat/completions": Names("messages", "messages", "max_tokens"),
    "/v1/messages": Names("messages", "messages", "max_tokens"),
    "/v1/responses": Names("input", "input", "max_output_tokens"),
    "/invocations": Names("messages", "messages", "max_tokens"),
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
    if names == NATIVE:
        return message
    field = _FIELD.match(message)
    if field is None:
        return message
    rest = message[field.end() :]
    if field[0] in ("text", "input_ids"):
        return (names.text if field[0] == "text" else names.ids) + rest
    if field[0] == NATIVE.tokens:
        return names.tokens + rest
    return field[0].removeprefix("sampling_params.") + rest


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
