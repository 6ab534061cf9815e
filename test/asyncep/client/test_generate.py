"""The client against an HTTP server that answers as it is told: what goes out, what comes back, what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from asyncep.client import generate
from asyncep.client.errors import RejectedError, ServerError
from asyncep.client.generate import GenerateClient
from asyncep.client.plan import TokenCost
from asyncep.client.probes import Probe, Reading
from asyncep.client.server_facts import ask_server
from asyncep.client.tokens import ServerTokens, tokens_for

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_FIRST_WAIT_SECONDS", 0.0)


def with_server(routes: dict[str, Handler], work: Callable[[GenerateClient], Awaitable[T]]) -> T:
    async def run() -> T:
        app = web.Application()
        for path, handler in routes.items():
            app.router.add_route("*", path, handler)
        async with TestServer(app) as server, GenerateClient(str(server.make_url(""))) as client:
            return await work(client)

    return asyncio.run(run())


def info(ids: list[int], after: list[int], own: list[int], cached: int = 0) -> dict[str, Any]:
    """An answer as SGLang writes it; every log-probability is minus its token's id."""
    return {
        "meta_info": {
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(ids),
            "cached_tokens": cached,
            "input_token_logprobs": [[None, 77, None], *([-token, token, None] for token in own)],
            "output_token_ids_logprobs": [[[-token, token, None] for token in after]] if after else [],
        }
    }


def test_probes_go_out_as_one_request_and_come_back_in_order() -> None:
    bodies: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.Response:
        body = await request.json()
        bodies.append(body)
        starts = body.get("logprob_start_len") or [-1] * len(body["input_ids"])
        wanted = body["token_ids_logprob"]
        per_prompt = wanted if isinstance(wanted[0], list | None) else [wanted] * len(body["input_ids"])
        return web.json_response(
            [
                info(ids, after or [], ids[start + 1 :] if start >= 0 else [], cached=len(ids) - 1)
                for ids, start, after in zip(body["input_ids"], starts, per_prompt, strict=True)
            ]
        )

    async def work(client: GenerateClient) -> list[list[Reading]]:
        return [
            await client.answer([Probe([1, 2], (5, 6)), Probe([3], (5, 6))], rank=1),
            await client.answer([Probe([1, 2, 3, 4], (9,), 2), Probe([8, 9], (7, 8))]),
        ]

    same, mixed = with_server({"/generate": answer}, work)
    assert same == [Reading([-5, -6], [], 1), Reading([-5, -6], [], 0)]
    assert mixed == [Reading([-9], [-3, -4], 3), Reading([-7, -8], [], 1)]
    assert bodies[0] == {
        "input_ids": [[1, 2], [3]],
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "token_ids_logprob": [5, 6],
        "routed_dp_rank": 1,
    }
    assert bodies[1]["token_ids_logprob"] == [[9], [7, 8]]
    # The log-probability of position 2 is read at position 1.
    assert bodies[1]["logprob_start_len"] == [1, -1]
    assert "routed_dp_rank" not in bodies[1]


PROBE = Probe([1, 2, 3], (5,), 1)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([], "1 answers expected"),
        ({"error": "?"}, "1 answers expected"),
        ([{}], "another form than SGLang's"),
        ([info([1, 2, 3], [6], [2, 3])], r"asked for log-probabilities of tokens \[5\]"),
        ([info([1, 2, 3], [5], [2, 4])], r"asked for log-probabilities of tokens \[2, 3\]"),
        ([info([1, 2, 3], [5], [])], r"asked for log-probabilities of tokens \[2, 3\]"),
        ([{"meta_info": {"finish_reason": {"type": "abort", "message": "rank lost"}}}], "aborted: rank lost"),
    ],
)
def test_answers_that_are_not_what_was_asked_for(answer: Any, words: str) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(answer)

    with pytest.raises(ServerError, match=words):
        with_server({"/generate": handler}, lambda client: client.answer([PROBE]))


def test_a_refusal_is_not_repeated_and_a_hiccup_is() -> None:
    statuses = [503, 429, 500, 200]
    asked: list[str] = []

    async def hiccup(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response([info([1, 2, 3], [5], [2, 3])], status=statuses[len(asked) - 1])

    async def refusal(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({"error": {"message": "token id 9999"}}, status=400)

    [reading] = with_server({"/generate": hiccup}, lambda client: client.answer([PROBE]))
    assert reading.next == [-5]
    assert len(asked) == 4
    asked.clear()
    with pytest.raises(RejectedError, match=r"/generate answered 400: .*token id 9999"):
        with_server({"/generate": refusal}, lambda client: client.answer([PROBE]))
    assert len(asked) == 1


def test_a_server_that_stays_away() -> None:
    async def down(_: web.Request) -> web.Response:
        return web.Response(status=503, text="loading")

    with pytest.raises(ServerError, match="answered 503: loading"):
        with_server({"/generate": down}, lambda client: client.answer([PROBE]))

    async def nobody() -> None:
        async with GenerateClient("http://127.0.0.1:9") as client:
            await client.answer([PROBE])

    with pytest.raises(ServerError, match=r"http://127.0.0.1:9"):
        asyncio.run(nobody())


def json_at(body: Any) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(body)

    return handler


def test_what_servers_say_of_themselves() -> None:
    two_ranks = {"/server_info": {"dp_size": 2, "page_size": 16, "max_req_input_len": 90}, "/model_info": {}}
    routed = {**two_ranks, "/workers": {"workers": [{}, {}, {}], "total": 3}}
    plain = {"/server_info": {}, "/model_info": {"model_path": "far/away", "tokenizer_path": "far/away"}}
    engine, router, stock = (
        with_server({path: json_at(body) for path, body in bodies.items()}, ask_server)
        for bodies in (two_ranks, routed, plain)
    )
    assert (engine.ranks, engine.addressable, engine.page, engine.most_tokens) == (2, True, 16, 89)
    # Behind a router no rank is named, but there is work for all of them.
    assert (router.ranks, router.addressable) == (6, False)
    assert (stock.ranks, stock.addressable, stock.page, stock.most_tokens) == (1, False, 1, None)
    assert isinstance(stock.cost, TokenCost)
    assert not stock.counts_flops
    assert stock.threshold == 2048
    with pytest.raises(ServerError, match="not a server of SGLang's kind"):
        with_server({}, ask_server)


def test_a_tokenizer_that_is_not_here_is_asked() -> None:
    async def tokenize(request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": [[len(text)] for text in body["prompt"]]})

    async def work(client: GenerateClient) -> list[list[int]]:
        tokens = await tokens_for(client, "/no/such/folder")
        assert isinstance(tokens, ServerTokens)
        return await tokens.encode(["one", "three"])

    assert with_server({"/tokenize": tokenize}, work) == [[3], [5]]
