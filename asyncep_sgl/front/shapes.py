"""The shape of a request's body, checked on the plain JSON before SGLang makes objects of it.

SGLang's models are unions of lists. Where a list has entries of the wrong type, an error is made for each entry and
each branch of the union: 2 MB of ones where texts are needed stop a server for ten seconds. So the lists that may be
long are named here with what they hold, and everything else is small.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from asyncep_sgl.front.asgi import Refusal, refuse
from asyncep_sgl.front.bodies import replay
from asyncep_sgl.front.rules import shown

# What pydantic and SGLang may get of any type: so many errors take milliseconds.
SHORT = 256
# Names and entries of objects and lists, nested ones counted, in a field that has no bound of its own below.
NODES = 1024
_MOST_FIELDS = 256
_TOOLS = "tools"
# Of entries in a list inside of tools that are no scalars of one type: SGLang compares each with each.
_COMPARED = 64

_TEXTS, _IDS = frozenset({str}), frozenset({int})
# Lists that may be long: what their entries are, and what the entries of those are that are lists themselves.
_LONG: Mapping[str, tuple[frozenset[type], frozenset[type]]] = {
    "text": (_TEXTS, _TEXTS),
    "input_ids": (frozenset({int, list}), _IDS),
    "prompt": (frozenset({str, int, list}), _IDS),
    "input": (frozenset({str, int, list}), _IDS),
    "query": (_IDS, _IDS),
    "items": (frozenset({str, list}), _IDS),
    "documents": (_TEXTS, _TEXTS),
    "tokens": (frozenset({int, list}), _IDS),
    "label_token_ids": (frozenset({int, list}), _IDS),
    "token_ids_logprob": (frozenset({int, list}), _IDS),
    "rid": (_TEXTS, _TEXTS),
    "extra_key": (_TEXTS, _TEXTS),
    "cache_salt": (_TEXTS, _TEXTS),
    "lora_path": (frozenset({str, type(None)}), _TEXTS),
    "return_logprob": (frozenset({bool}), _TEXTS),
    "logprob_start_len": (_IDS, _IDS),
    "top_logprobs_num": (_IDS, _IDS),
}
# Where a field holds something else than elsewhere: pairs of texts, texts only, no lists of lists, no long list.
_ELSEWHERE: Mapping[tuple[str, str], tuple[frozenset[type], frozenset[type]]] = {
    **{(path, "text"): (frozenset({str, list}), _TEXTS) for path in ("/encode", "/classify")},
    **{(path, "prompt"): (_TEXTS, _TEXTS) for path in ("/tokenize", "/v1/tokenize")},
    ("/v1/rerank", "query"): (frozenset(), _TEXTS),
    ("/v1/classify", "input"): (frozenset({str, int}), _IDS),
}
# Fields of many objects, with their nodes.
_MANY: Mapping[str, int] = {"messages": 1 << 12, "sampling_params": 1 << 18, "instances": 1 << 20}
_NAMES = {str: "a string", int: "a whole number", bool: "true or false", list: "a list", type(None): "null"}


@dataclass
class ShapeGate:
    """ASGI middleware: refuses bodies with 400 that SGLang would take long to find wrong.

    Stands inside of `BodyGate`, which passes a body on in one piece.

    Attributes:
        paths: of the endpoints that read JSON.
        most_values: log-probabilities in one answer.
    """

    app: ASGIApp
    paths: Collection[str]
    most_values: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or refuses it."""
        if scope["type"] != "http" or scope["path"].rstrip("/") not in self.paths:
            await self.app(scope, receive, send)
            return
        message = await receive()
        body = message.get("body", b"")
        try:
            if body:
                check_body(body, self.most_values, scope["path"].rstrip("/"))
        except Refusal as refusal:
            await refuse(send, refusal)
            return
        # Who has left is said again by whoever is asked.
        await self.app(scope, replay(body, receive) if message["type"] == "http.request" else receive, send)


def check_body(body: bytes, most_values: int, path: str = "") -> None:
    """Checks a body.

    Args:
        body: of a request that is to be JSON.
        most_values: log-probabilities in one answer.
        path: of the endpoint.

    Raises:
        Refusal: 400; it is not JSON, or a field is not of a shape that any endpoint takes. Names the field.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    try:
        check_fields(fields, most_values, path)
    except ValueError as error:
        raise Refusal(400, str(error)) from None


def check_fields(fields: Any, most_values: int, path: str = "") -> None:
    """Checks what a body holds.

    Raises:
        ValueError: names the field, and what is taken.
    """
    if not isinstance(fields, dict):
        raise ValueError("the body is not a JSON object")
    if len(fields) > _MOST_FIELDS:
        raise ValueError(f"the body has {len(fields)} fields; at most {_MOST_FIELDS} are taken")
    for name, value in fields.items():
        if not isinstance(value, list | dict):
            continue
        if name in _LONG and isinstance(value, list) and _is_long(value):
            _check_long(name, value, *_ELSEWHERE.get((path, name), _LONG[name]))
        else:
            _check_nodes(shown(name)[1:-1], value, _MANY.get(name, NODES))
            if name in _MANY and isinstance(value, list) and not set(map(type, value)) <= {dict}:
                raise ValueError(f"{name}: a list of objects is needed")
        if name == _TOOLS:
            _check_tools(value)
    for message in _objects(fields.get("messages")):
        if _TOOLS in message:
            _check_nodes("messages: tools", message[_TOOLS], NODES)
            _check_tools(message[_TOOLS])
    _check_scores(fields, most_values)


def _is_long(value: list[Any]) -> bool:
    return len(value) + sum(len(entry) for entry in value if isinstance(entry, list | dict)) > SHORT


def _check_long(name: str, value: list[Any], outer: frozenset[type], inner: frozenset[type]) -> None:
    if not outer:
        raise ValueError(f"{name}: a list of {len(value)} entries; a string is needed")
    # All of the first one's kind, but for nulls where those stand for the default.
    taken = outer if type(None) in outer else outer & {type(value[0])}
    if not set(map(type, value)) <= taken:
        place = next(place for place, entry in enumerate(value) if type(entry) not in taken)
        raise ValueError(f"{name}[{place}]: {shown(value[place])}: {_needed(taken or outer)} is needed")
    if taken == {list} and not all(value):
        raise ValueError(f"{name}[{value.index([])}]: an empty list")
    if taken == {list} and not set(map(type, chain.from_iterable(value))) <= inner:
        for place, entry in enumerate(value):
            within = next((within for within, one in enumerate(entry) if type(one) not in inner), None)
            if within is not None:
                wrong = shown(entry[within])
                raise ValueError(f"{name}[{place}][{within}]: {wrong}: {_needed(inner)} is needed")


def _needed(kinds: Collection[type]) -> str:
    return " or ".join(words for kind, words in _NAMES.items() if kind in kinds)


def _check_nodes(name: str, value: Any, most: int) -> None:
    if sum(1 for _ in islice(_nodes(value), most + 1)) > most:
        raise ValueError(f"{name}: over {most} names and entries; this endpoint takes no more in this field")


def _nodes(value: Any) -> Iterator[Any]:
    """Everything in an object or a list, however deep; nothing in anything else."""
    left = [value] if isinstance(value, list | dict) else []
    while left:
        holder = left.pop()
        for entry in holder.values() if isinstance(holder, dict) else holder:
            yield entry
            if isinstance(entry, list | dict):
                left.append(entry)


def _check_tools(value: Any) -> None:
    for entry in chain([value], _nodes(value)):
        if isinstance(entry, list) and len(entry) > _COMPARED:
            kinds = set(map(type, entry))
            if len(kinds) > 1 or kinds & {list, dict}:
                raise ValueError(f"{_TOOLS}: a list of {len(entry)} entries of several kinds; at most {_COMPARED}")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    return (entry for entry in value if isinstance(entry, dict)) if isinstance(value, list) else iter(())


def _check_scores(fields: dict[str, Any], most: int) -> None:
    """``/v1/score`` repeats the labels for each item."""
    items, labels = fields.get("items"), fields.get("label_token_ids")
    if isinstance(items, list) and isinstance(labels, list) and labels and not isinstance(labels[0], list):
        values = len(items) * len(labels)
        if values > most:
            raise ValueError(
                f"items, label_token_ids: {len(items)} items with {len(labels)} labels each make {values} "
                f"log-probabilities, {most} are taken (--asyncep-max-logprobs); send several requests"
            )
