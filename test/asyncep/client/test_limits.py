"""A client's patience: servers that say nothing, or something else, or are gone, lead to an error, not to a wait."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep import Runtime
from asyncep.cli import main
from asyncep.client import generate
from asyncep.client.address import server_url
from asyncep.client.errors import NOT_THE_PROMPTS, OptionError, RejectedError, ServerError
from asyncep.client.generate import Behind, GenerateClient
from asyncep.client.lanes import Lanes
from asyncep.client.plan import Batch, Plan
from asyncep.client.probes import Probe
from asyncep.client.server_facts import ServerFacts, ask_server
from asyncep.client.tokens import ServerTokens, Untokenized
from asyncep.tasks.session import open_session

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
PROBE = Probe([1, 2, 3], (5,))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits in miniature: that there are some is what is tested, and what follows."""
    monkeypatch.setattr(generate, "_QUESTION_SECONDS", 0.5)
    monkeypatch.setattr(generate, "_CONNECT_SECONDS", 0.4)
    monkeypatch.setattr(generate, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(generate, "_FIRST_WAIT_SECONDS", 0.0)


async def silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def half_an_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
    await reader.read()


async def a_drop_at_a_time(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        while not writer.is_closing():
            writer.write(b" ")
            await writer.drain()
            await asyncio.wait({asyncio.ensure_future(reader.read(1))}, timeout=0.05)


async def another_protocol(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.9\r\n")
    await reader.read(1)
    writer.close()


async def hanging_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def a_page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\n<html>hi</html>")
    writer.close()


@contextlib.asynccontextmanager
async def talking(talk: Talk) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await talk(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        (silence, r"GET /\w+ was not answered within 0.5 s"),
        (half_an_answer, r"GET /\w+ was not answered within 0.5 s"),
        (a_drop_at_a_time, r"GET /\w+ was not answered within 0.5 s"),
        (another_protocol, r"GET /\w+: "),
        (hanging_up, r"GET /\w+: .*([Dd]isconnected|reset by peer)"),
        (a_page, r"GET /\w+: not JSON: .*SGLang's kind"),
    ],
)
def test_what_is_no_server_is_said_in_time(talk: Talk, words: str) -> None:
    async def run() -> None:
        async with talking(talk) as url:
            with pytest.raises(ServerError, match=rf"{url}: {words}"):
                async with open_session(url):
                    pass

    asyncio.run(run())


@pytest.fixture
def mute() -> Any:
    """A listener that accepts nothing: the kernel does, and nobody ever reads."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def full() -> Any:
    """A listener whose queue is full: further connections are not even refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = listener.getsockname()
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        yield f"http://127.0.0.1:{address[1]}"


def test_runtime_and_command_end_on_a_server_that_says_nothing(
    mute: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ServerError, match=f"{mute}: GET .* was not answered within 0.5 s"):
        Runtime.connect(mute).start()
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    command = ["classify", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--labels", "a,b"]
    assert main([*command, "--url", mute.removeprefix("http://")]) == 1
    assert f"asyncep classify: {mute}: GET" in capsys.readouterr().err


def test_a_connection_that_does_not_come_about(full: str) -> None:
    with pytest.raises(ServerError, match=rf"{full}: .*(onnection timeout|not answered within)"):
        Runtime.connect(full).start()


def test_tls_that_is_never_shaken_hands_on(mute: str) -> None:
    with pytest.raises(ServerError, match=r"https://.*(onnection timeout|not answered within)"):
        Runtime.connect(mute.replace("http:", "https:")).start()


def test_connections_are_kept_an_eye_on() -> None:
    """Observed on the sockets that a client uses, not on those it might."""
    kept = []

    async def run() -> None:
        async with talking(half_an_answer) as url, GenerateClient(url) as client:
            assert client._session is not None
            async with client._session.get(url) as response:
                assert response.connection is not None
                assert response.connection.transport is not None
                used = response.connection.transport.get_extra_info("socket")
                kept.extend(
                    used.getsockopt(*option)
                    for option in (
                        (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
                    )
                )

    asyncio.run(run())
    assert kept == [1, 30, 90_000]


def served(routes: dict[str, Any], work: Callable[[GenerateClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        app = web.Application()
        for path, handler in routes.items():
            app.router.add_route("*", path, handler if callable(handler) else _answering(handler))
        async with TestServer(app) as server, GenerateClient(str(server.make_url(""))) as client:
            return await work(client)

    return asyncio.run(run())


def _answering(body: Any, status: int = 200) -> Any:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    return handler


def _generated(ids: list[int]) -> dict[str, Any]:
    return {
        "meta_info": {
            "finish_reason": None,
            "cached_tokens": 0,
            "input_token_logprobs": [],
            "output_token_ids_logprobs": [[[-1.0, 5, None]]],
        }
    }


def test_long_work_is_waited_for_as_long_as_the_server_is_there() -> None:
    release = asyncio.Event()
    looks = 0

    async def slow(_: web.Request) -> web.Response:
        await release.wait()
        return web.json_response([_generated([1])])

    async def model_info(_: web.Request) -> web.Response:
        nonlocal looks
        looks += 1
        if looks == 3:
            release.set()
        # An error is a sign of life, too.
        return web.json_response({}, status=503)

    [reading] = served({"/generate": slow, "/model_info": model_info}, lambda client: client.answer([PROBE]))
    assert reading.next == [-1.0]
    assert looks == 3


def test_a_server_that_stops_in_the_middle_is_given_up() -> None:
    looks = []

    async def never(request: web.Request) -> web.Response:
        if request.path == "/model_info":
            looks.append(request)
        await asyncio.Event().wait()
        raise AssertionError(request.path)

    async def work(client: GenerateClient) -> None:
        await client.get("/server_info")
        results = await asyncio.gather(*(client.answer([PROBE]) for _ in range(20)), return_exceptions=True)
        for result in results:
            assert isinstance(result, ServerError)
            assert "/generate is not answered, nor is /model_info, 3 times within 0.5 s" in str(result)
        # However many wait, they look once.
        assert len(looks) == 3

    served({"/generate": never, "/model_info": never, "/server_info": {}}, work)


def test_a_quarantined_request_is_not_sent_again() -> None:
    asked = []

    async def deadly(request: web.Request) -> web.Response:
        asked.append(await request.json())
        return web.json_response({"error": {"message": "the request is quarantined: two ranks died of it"}}, status=500)

    with pytest.raises(RejectedError, match="quarantined"):
        served({"/generate": deadly}, lambda client: client.answer([PROBE]))
    assert len(asked) == 1


FACTS = {"/server_info": {"dp_size": 2}, "/model_info": {"model_path": "m"}}
ROUTER = {"/router/state": {"ranks": {"0": {"batch_flops": 5}}}}


@pytest.mark.parametrize(
    ("routes", "knows"),
    [
        ({**FACTS, **ROUTER}, True),
        ({**FACTS, "/asyncep/status": {"ranks": [1]}}, True),
        ({**FACTS, **ROUTER, "/workers": {"workers": [{}]}}, True),
        (FACTS, False),
        ({**FACTS, "/workers": {"workers": [{}]}}, False),
        ({**FACTS, **ROUTER, "/server_info": {"dp_size": 2, "abort_on_priority_when_disabled": True}}, False),
        ({**FACTS, **ROUTER, "/server_info": {"dp_size": 2, "enable_priority_scheduling": True}}, False),
    ],
)
def test_only_servers_of_ours_are_told_what_can_wait(routes: dict[str, Any], knows: bool) -> None:
    priorities = []

    async def answer(request: web.Request) -> web.Response:
        body = await request.json()
        priorities.append(body.get("priority"))
        return web.json_response([_generated(ids) for ids in body["input_ids"]])

    async def work(client: GenerateClient) -> None:
        facts: ServerFacts = await ask_server(client)
        assert facts.priorities == knows
        async with open_session(client.url) as session:
            for prompts, behind in ((3, False), (64, False), (65, False), (3, True)):
                before = len(priorities)
                found = await session.scorer.score(
                    [[9, n, prompts, behind] for n in range(prompts)], _label_set(), behind=behind
                )
                assert not [entry for entry in found if isinstance(entry, str)]
                expected = {-1} if knows and (behind or prompts > 64) else {None}
                assert set(priorities[before:]) == expected

    served({**routes, "/generate": answer, "/tokenize": {"tokens": []}}, work)


def _label_set() -> Any:
    from asyncep.client.labels import LabelSet

    return LabelSet([[5]])


def test_a_worker_that_refuses_priorities_is_not_sent_them_again() -> None:
    priorities = []

    async def stock(request: web.Request) -> web.Response:
        body = await request.json()
        priorities.append(body.get("priority"))
        if "priority" in body:
            message = "Using priority is disabled for this server. Please send a new request without a priority."
            return web.json_response({"error": {"message": message}}, status=503)
        return web.json_response([_generated([1])])

    async def work(client: GenerateClient) -> None:
        behind = Behind(client)
        await behind.answer([PROBE])
        await behind.answer([PROBE])

    served({"/generate": stock}, work)
    assert priorities == [-1] * 5 + [None, None]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "/server_info is"),
        ("x", "/server_info is"),
        ({"dp_size": "two"}, "invalid literal"),
        ({"page_size": {"x": 1}}, ""),
    ],
)
def test_servers_of_another_kind(body: Any, words: str) -> None:
    with pytest.raises(ServerError, match=f"not a server of SGLang's kind.*{words}"):
        served({"/server_info": body, "/model_info": {}}, ask_server)


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_is_called_that(status: int) -> None:
    with pytest.raises(ServerError, match="refuses the key, or wants one: give api_key"):
        served({"/server_info": _answering({}, status), "/model_info": {}}, ask_server)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://127.0.0.1:30000", "http://127.0.0.1:30000"),
        ("127.0.0.1:42000", "http://127.0.0.1:42000"),
        ("localhost:42000/", "http://localhost:42000"),
        (" https://host/prefix/ ", "https://host/prefix"),
        ("[::1]:80", "http://[::1]:80"),
        ("host", "http://host"),
    ],
)
def test_addresses_as_people_write_them(written: str, meant: str) -> None:
    assert server_url(written) == meant


@pytest.mark.parametrize(
    "written",
    ["", "http://", "ftp://host", "http://host:99999", "http://host:x", "host:0", "a b", "http://h?x=1", None, 5],
)
def test_what_is_no_address(written: Any) -> None:
    with pytest.raises(OptionError, match=r"url=.*give the address of a server, such as http://127.0.0.1:30000"):
        Runtime.connect(written)


@given(st.text())
def test_any_text_is_an_address_or_refused_as_none(written: str) -> None:
    with contextlib.suppress(OptionError):
        assert server_url(written).startswith(("http://", "https://"))


@given(st.lists(st.integers(0, 40000), max_size=30), st.sets(st.integers(0, 29)))
@settings(max_examples=15, deadline=None)
def test_texts_are_tokenized_in_pieces_and_a_refused_one_spoils_no_other(lengths: list[int], refused: set[int]) -> None:
    texts = [("!" if number in refused else "x") + "a" * length for number, length in enumerate(lengths)]
    sizes = []

    async def tokenize(request: web.Request) -> web.Response:
        prompts = (await request.json())["prompt"]
        sizes.append(sum(map(len, prompts)) if len(prompts) > 1 else 0)
        if any(prompt[0] == "!" for prompt in prompts):
            return web.json_response({"error": {"message": "too long"}}, status=413)
        return web.json_response({"tokens": [[len(prompt)] for prompt in prompts]})

    found = served({"/tokenize": tokenize}, lambda client: ServerTokens(client).encode(texts))
    assert max(sizes, default=0) <= 1 << 15
    assert len(found) == len(texts)
    for text, ids in zip(texts, found, strict=True):
        if text[0] == "!":
            assert isinstance(ids, Untokenized)
            assert "too long" in ids.reason
        else:
            assert ids == [len(text)]


def test_a_text_that_is_refused_is_an_error_of_its_row() -> None:
    async def tokenize(request: web.Request) -> web.Response:
        prompts = (await request.json())["prompt"]
        refused = any("long" in prompt for prompt in prompts)
        return web.json_response({"tokens": [[7] for _ in prompts]}, status=413 if refused else 200)

    async def answer(request: web.Request) -> web.Response:
        return web.json_response([_generated(ids) for ids in (await request.json())["input_ids"]])

    async def work(client: GenerateClient) -> None:
        async with open_session(client.url) as session:
            first, second = await session.logprobs(["a", "long"], [5])
            assert first.log_probabilities == (-1.0,)
            assert "413" in (second.error or "")

    served({**FACTS, "/generate": answer, "/tokenize": tokenize}, work)


def test_a_rate_that_is_used_up_is_waited_for() -> None:
    asked = []

    async def limited(request: web.Request) -> web.Response:
        asked.append(request.path)
        if len(asked) < 9:
            return web.json_response({"error": {}}, status=429, headers={"Retry-After": "0"})
        return web.json_response([_generated([1])])

    [reading] = served({"/generate": limited}, lambda client: client.answer([PROBE]))
    assert reading.next == [-1.0]
    assert len(asked) == 9


@pytest.mark.parametrize("status", NOT_THE_PROMPTS)
def test_a_server_that_no_longer_lets_the_client_in_is_no_fault_of_the_prompts(status: int) -> None:
    """A key that is taken away in the middle of a job ends it, where its rows so far can be resumed."""
    asked: list[int] = []
    told: list[Sequence[Any]] = []

    async def ask(prompts: Sequence[Any], _: int | None) -> list[str]:
        asked.append(len(prompts))
        if len(asked) > 2:
            rejected = RejectedError(f"answered {status}")
            rejected.status = status
            raise rejected
        return ["answer"] * len(prompts)

    async def run() -> None:
        batches = tuple(Batch((row, row + 1), 1.0, None) for row in range(0, 20, 2))
        plan = Plan(lanes=(batches,), same_as=(), possible_cached=0)
        async with Lanes(1, addressable=False, in_flight=1) as lanes:
            await lanes.run(plan, [[1]] * 20, ask, lambda rows, answers: told.append(answers))  # type: ignore[arg-type]

    with pytest.raises(RejectedError, match=str(status)):
        asyncio.run(run())
    assert asked == [2, 2, 2]
    assert told == [["answer"] * 2] * 2
