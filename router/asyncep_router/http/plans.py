"""What a client's request asks of ranks: its prompts as token ids, and the bodies that go to workers.

A plan is made once, its prompts are placed, and for every rank found it writes the body for the prompts
placed there. Where exactness could suffer the client's own bytes are forwarded; its prompts then only guide
the placement.
"""

from __future__ import annotations

import re
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import orjson

from asyncep_router.http.errors import BadRequest
from asyncep_router.http.tokenizer import TokenizeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncep_router.http.tokenizer import Tokenizer

_CACHED = re.compile(rb'"cached_tokens":\s*(\d+)')

# Prompts of these count as another kind of text than token ids: bytes, four to a pseudo token.
_BYTES_NAMESPACE = "bytes"
_MOST_BYTES = 1 << 20


class Prompt(NamedTuple):
    """One sequence. `exact`: these are its token ids; otherwise they only stand for them.

    `logits`: positions whose logits are computed.
    """

    token_ids: array[int]
    logits: int = 1
    exact: bool = True


class Plan(Protocol):
    """See the module. `path`: the worker's endpoint. `joined`: pieces are merged, else the one answer is passed on.

    `pinned`: the data-parallel rank the client asks for.
    """

    path: str
    prompts: Sequence[Prompt]
    joined: bool
    stream: bool
    priority: int
    namespace: str | None
    pinned: int | None

    def body(self, indices: Sequence[int], dp_rank: int | None) -> bytes:
        """For the worker that gets these prompts; `dp_rank` None if it has only one rank."""

    def read(self, reply: bytes, count: int) -> list[Any]:
        """The answers to `count` prompts sent together. Raises `ValueError` if they are not there."""

    def merge(self, answers: Sequence[Any]) -> bytes:
        """The client's answer from those to all prompts, in their order."""


def cached_tokens(reply: bytes) -> int | None:
    """`meta_info.cached_tokens` of an answer to one prompt, None if it says nothing.

    Text inside JSON has its quotes escaped, so an answer cannot imitate the key.
    """
    found = _CACHED.search(reply)
    return int(found.group(1)) if found else None


def bytes_prompt(data: bytes) -> Prompt:
    """Stands for a prompt whose tokens are unknown: equal beginnings stay equal, length comes out about right.

    Of more than 1 MiB only the beginning counts: the rest would push other prompts out of the view.
    """
    data = data[:_MOST_BYTES]
    words = array("I")
    words.frombytes(data + bytes(-len(data) % words.itemsize))
    return Prompt(array("q", words), exact=False)


def as_prompt(ids: Any, logits: int = 1) -> Prompt | None:
    """Token ids from JSON, None if it is no list of integers."""
    if not isinstance(ids, list) or not ids:
        return None
    try:
        return Prompt(array("q", ids), logits)
    except (TypeError, OverflowError):
        return None


def parse(raw: bytes) -> dict[str, Any]:
    """A request's body. Raises `BadRequest`."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    return body


def written(value: Any) -> bytes:
    """What a client sent, as JSON for a worker.

    Raises:
        BadRequest: it cannot be written, as it is nested deeper than 254 levels.
    """
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise BadRequest(f"the body cannot be passed on: {error}") from None


class Forward:
    """The client's body as it is, to one rank, named in it where the endpoint can."""

    joined = False

    def __init__(self, path: str, raw: bytes, prompt: Prompt, fields: dict[str, Any], *, pinnable: bool) -> None:
        self.path = path
        self.prompts: Sequence[Prompt] = (prompt,)
        self._raw = raw
        self._pinnable = pinnable
        self._empty = not fields
        self.stream = fields.get("stream") is True
        self.priority, self.namespace, self.pinned = common(fields, pinnable)
        if not prompt.exact:
            self.namespace = f"{_BYTES_NAMESPACE} {self.namespace or ''}"

    def body(self, indices: Sequence[int], dp_rank: int | None) -> bytes:
        if dp_rank is None or not self._pinnable or self.pinned is not None:
            return self._raw
        # Spliced in, so that thousands of token ids need not be written again.
        start = self._raw.index(b"{") + 1
        comma = b"" if self._empty else b","
        return b'{"routed_dp_rank":%d%b%b' % (dp_rank, comma, self._raw[start:])

    def read(self, reply: bytes, count: int) -> list[Any]:
        return [reply]

    def merge(self, answers: Sequence[Any]) -> bytes:
        return bytes(answers[0])


def common(fields: dict[str, Any], pinnable: bool) -> tuple[int, str | None, int | None]:
    """(priority, namespace, data-parallel rank asked for) of any request."""
    priority = fields.get("priority")
    names = [str(fields[key]) for key in ("lora_path", "extra_key", "cache_salt") if fields.get(key)]
    pinned = fields.get("routed_dp_rank", fields.get("data_parallel_rank")) if pinnable else None
    return (
        priority if type(priority) is int else 0,
        "|".join(names) or None,
        pinned if type(pinned) is int else None,
    )


async def encode(tokenizer: Tokenizer | None, texts: Sequence[str]) -> list[array[int]] | None:
    """Token ids of texts, None where nobody can tell."""
    if tokenizer is None:
        return None
    try:
        return await tokenizer.encode(texts)
    except TokenizeError:
        return None


async def plan_completion(raw: bytes, fields: dict[str, Any], tokenizer: Tokenizer | None) -> Plan:
    """`/v1/completions`: placed by its prompt's tokens, forwarded as it is (the echo must be the client's text)."""
    prompt = fields.get("prompt")
    found = as_prompt(prompt)
    if found is None and isinstance(prompt, str):
        ids = await encode(tokenizer, [prompt])
        found = as_prompt(list(ids[0])) if ids else None
    return Forward("/v1/completions", raw, found or bytes_prompt(raw), fields, pinnable=True)


def plan_opaque(path: str, raw: bytes, fields: dict[str, Any]) -> Plan:
    """Anything else: placed by the bytes of what is asked, forwarded as it is."""
    told = next((fields[key] for key in ("messages", "input", "query", "text") if fields.get(key)), None)
    prompt = bytes_prompt(raw if told is None else written(told))
    return Forward(path, raw, prompt, fields, pinnable=path == "/v1/chat/completions")
