"""Hostile requests: each field's extremes alone, in pairs, and what is no proper request at all. Pure.

`alone` lists every one of the first kind; `drawn` takes any number of the others from a hypothesis strategy, the same
ones for the same seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from hostile.fields import DEEP, STRINGS, WRONG, example, extremes, nested, text
from hostile.schema import Field, Route

# A body is a tree whose leaves are JSON text.
Tree = Mapping[str, "str | Tree"]
# How it is sent: whole and waited for; half of it, then the connection is closed; whole, and not waited for.
Manner = Literal["whole", "cut", "left"]

_BIG = 20_000
_PATIENCE, _LONG_PATIENCE = 30.0, 120.0
# What a request must say to be served at all by a prefill-only server, wherever a route has such a field.
_HONEST: dict[str, str | Tree] = {
    "messages": '[{"role":"user","content":"a b"}]',
    "max_tokens": "1",
    "max_output_tokens": "1",
    "model": '"default"',
    "sampling_params": {"max_new_tokens": "0"},
    "options": '{"num_predict":1}',
}
# Requests that reach the ranks, singly and as lists, for the routes that have more than one form of them.
_FORMS: dict[str, tuple[Tree, ...]] = {
    "/generate": (
        {"text": '"a b c"', "return_logprob": "true", "token_ids_logprob": "[3,4]"},
        {"text": '["a b","c"]', "return_logprob": "[true,true]", "token_ids_logprob": "[[3],[4]]"},
        {"input_ids": "[5,6,7]", "return_logprob": "true", "logprob_start_len": "0", "top_logprobs_num": "2"},
        {"input_ids": "[[5,6,7],[8,9]]"},
    ),
    "/v1/completions": (
        {"prompt": '"a b c"', "max_tokens": "0", "echo": "true", "logprobs": "1"},
        {"prompt": '["a b","c"]', "max_tokens": "0", "echo": "true", "logprobs": "1"},
        {"prompt": "[[5,6,7],[8]]", "max_tokens": "1"},
    ),
    "/v1/score": (
        {"query": '"a"', "items": '["b","c"]', "label_token_ids": "[3,4]"},
        {"query": "[5,6]", "items": "[[7],[8]]", "label_token_ids": "[3]"},
    ),
    "/v1/rerank": ({"query": '"cats"', "documents": '["a","b"]'},),
    "/v1/embeddings": ({"input": '"a b"'}, {"input": '["a","b"]'}, {"input": "[[5,6],[7]]"}),
    "/v1/classify": ({"input": '"a b"'}, {"input": '["a","b"]'}),
    "/encode": ({"text": '"a b"'}, {"text": '["a","b"]'}),
    "/classify": ({"text": '"a b"'}, {"text": '["a","b"]'}),
    "/v1/tokenize": ({"prompt": '"a b"'}, {"prompt": '["a","b"]'}),
    "/v1/detokenize": ({"tokens": "[5,6]"}, {"tokens": "[[5],[6]]"}),
}


@dataclass(frozen=True)
class Case:
    """A request that may hurt.

    Attributes:
        body: of the request; bytes where it is no JSON object, None for no body.
        changed: the fields that make it hostile, with the JSON text they were given.
        query: after the path, with its question mark.
    """

    method: str
    path: str
    body: Tree | bytes | None
    changed: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    query: str = ""
    manner: Manner = "whole"

    @property
    def content(self) -> bytes:
        """The body as it is sent."""
        if self.body is None or isinstance(self.body, bytes):
            return self.body or b""
        return render(self.body).encode("utf-8", "surrogatepass")

    @property
    def patience(self) -> float:
        """Seconds within which an answer is due: a list of thousands is honest work for a while."""
        return _PATIENCE if len(self.content) < _BIG else _LONG_PATIENCE


def render(tree: Tree) -> str:
    """The JSON text of a body."""
    inside = (f"{text(key)}:{value if isinstance(value, str) else render(value)}" for key, value in tree.items())
    return "{" + ",".join(inside) + "}"


def changed(tree: Tree, path: Sequence[str], value: str) -> Tree:
    """``tree`` with another value at ``path``. An object written as text is lost to the change beside it."""
    first, *rest = path
    inner = tree.get(first)
    return {**tree, first: changed(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def forms(route: Route) -> list[Tree]:
    """Plain requests that a route takes; ones made from its schema where it is not known here."""
    by_name = {field.path[0]: field for field in route.fields if len(field.path) == 1}
    given: dict[str, str | Tree] = {name: value for name, value in _HONEST.items() if name in by_name}
    known = _FORMS.get(route.path)
    if known:
        return [{**given, **form} for form in known]
    needed = {name: example(by_name[name].schema) for name in route.required if name in by_name}
    return [{**needed, **given}]


def alone(routes: Sequence[Route]) -> Iterator[Case]:
    """Each field of each route with each of its extremes, in every form that the route's requests have."""
    return (made() for made in _alone(routes))


def _alone(routes: Sequence[Route]) -> Iterator[Callable[[], Case]]:
    """Each case of `alone` as what makes it: there are too many to make all of them before the first is sent.

    Where a path takes the same body by several methods, only by POST.
    """
    posted = {route.path for route in routes if route.method == "POST"}
    for route in routes:
        if not route.fields or (route.method != "POST" and route.path in posted):
            continue
        in_forms = forms(route)
        for field in route.fields:
            for value in extremes(field.schema):
                for form in in_forms:
                    yield partial(_with, route, form, [(field, value)])


def _with(route: Route, form: Tree, values: Sequence[tuple[Field, str]]) -> Case:
    body = form
    for field, value in values:
        body = changed(body, field.path, value)
    return Case(route.method, route.path, body, tuple((field.name, value) for field, value in values))


def improper(routes: Sequence[Route]) -> Iterator[Case]:
    """What is no proper request of any route: other JSON, no JSON, other types, wrong lengths, half a request."""
    for route in routes:
        if not route.fields:
            yield Case(route.method, route.path, None)
            yield Case(route.method, route.path, b'{"a":1}')
            yield Case(route.method, route.path, None, query="?timeout=1e308&level=-1&rank=9999999999&dp_rank=-5&x=%00")
            continue
        whole = render(forms(route)[0])
        for body in (*WRONG, *STRINGS, "", "{", whole[:-1], whole + whole, nested("[", "", "]"), '{"a":' * DEEP):
            yield Case(route.method, route.path, body.encode("utf-8", "surrogatepass"), (("body", body[:40]),))
        for odd in (b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf" + whole.encode(), whole.encode("utf-16"), b"\x00" * 64):
            yield Case(route.method, route.path, odd, (("body", repr(odd[:16])),))
        twice = whole[:-1] + "," + whole[1:]
        yield Case(route.method, route.path, twice.encode(), (("body", "every key twice"),))
        for header, value in (
            ("content-type", "text/plain"),
            ("content-type", "application/json; charset=utf-7"),
            ("content-type", "multipart/form-data"),
            ("content-encoding", "gzip"),
            ("x-request-id", "r" * 5000),
            ("expect", "100-continue"),
            ("authorization", "Bearer"),
        ):
            yield Case(route.method, route.path, whole.encode(), ((header, value[:40]),), ((header, value),))
        for manner in ("cut", "left"):
            yield Case(route.method, route.path, forms(route)[0], (("manner", manner),), manner=manner)
        yield Case("DELETE", route.path, whole.encode(), (("method", "DELETE"),))
        yield Case(route.method, route.path + "/../" + "%2e" * 20, whole.encode(), (("path", "%2e"),))


def pairs(routes: Sequence[Route]) -> st.SearchStrategy[Case]:
    """Two or three fields of a route at once, each with an extreme or with a small JSON document of any shape.

    Routes come up as often as they have fields.
    """
    places = [(route, field) for route in routes if len(route.fields) > 1 for field in route.fields]
    values = {(route.name, field.name): extremes(field.schema) for route, field in places}
    in_forms = {route.name: forms(route) for route, _ in places}
    leaves = st.sampled_from([None, True, 0, -1, 2**31, 1e308, "", "a", "\ud83d"])
    any_json = (leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=3), leaves, max_size=2)).map(
        text
    )

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        route, first = places[draw(st.integers(0, len(places) - 1))]
        others = st.sets(st.integers(0, len(route.fields) - 1), min_size=1, max_size=2)
        chosen = [first, *(route.fields[number] for number in sorted(draw(others)) if route.fields[number] != first)]
        given = []
        for field in chosen:
            mine = values[route.name, field.name]
            number = draw(st.integers(0, len(mine) + len(mine) // 4))
            given.append((field, mine[number] if number < len(mine) else draw(any_json)))
        mine_forms = in_forms[route.name]
        return _with(route, mine_forms[draw(st.integers(0, len(mine_forms) - 1))], given)

    return case()


def drawn(strategy: st.SearchStrategy[Case], number: int, count: int) -> list[Case]:
    """Up to ``count`` cases of a strategy, the same ones for the same ``number``."""
    found: list[Case] = []

    @seed(number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def take(case: Case) -> None:
        found.append(case)

    take()
    return found


def endless(routes: Sequence[Route], number: int, chunk: int = 100) -> Iterator[Case]:
    """Every case alone and every improper one in an order of chance, pairs among them, and then pairs for ever."""
    numbers = random.Random(number)
    single: list[Callable[[], Case]] = [*_alone(routes), *(partial(_itself, case) for case in improper(routes))]
    numbers.shuffle(single)
    strategy = pairs(routes)
    while True:
        mixed = [made() for made in single[: 2 * chunk]]
        del single[: 2 * chunk]
        mixed += drawn(strategy, numbers.randrange(2**31), chunk)
        numbers.shuffle(mixed)
        yield from mixed


def _itself(case: Case) -> Case:
    return case
