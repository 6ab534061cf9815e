"""The front's gates one by one, around small ASGI applications."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import orjson
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from asyncep_router.keys import Caller
from asyncep_sgl.front.asgi import Refusal
from asyncep_sgl.front.bodies import BodyGate, Held
from asyncep_sgl.front.connections import limited
from asyncep_sgl.front.mistakes import MistakesGate, without_sources
from asyncep_sgl.front.model_cards import ModelCardsGate
from asyncep_sgl.front.passage import caller, passage
from asyncep_sgl.front.secrets import SecretsGate, redacted
from asyncep_sgl.process.key_memory import hand_on, read_keys, without_keys

Gate = Callable[[Any, Any, Any], Awaitable[None]]


async def _call(gate: Gate, parts: list[bytes], path: str = "/generate", **more: Any) -> tuple[int, Any]:
    """Sends a POST in parts; answers status and body."""
    waiting = list(parts)
    sent: list[Any] = []

    async def receive() -> Any:
        if not waiting:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting) or "open" in more}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": more.get("headers", [])}
    scope["query_string"] = more.get("query", b"")
    await gate(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], orjson.loads(body) if body else None


async def _echo(_scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    assert not message["more_body"]
    await _answer(send, 200, {"bytes": len(message["body"])})


LONG_ANSWER = 24_000_000


async def _echo_or_long(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] != "/long":
        return await _echo(scope, receive, send)
    await _answer(send, 200, "x" * (LONG_ANSWER - 2))


async def _answer(send: Any, status: int, content: Any) -> None:
    body = orjson.dumps(content)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _bodies(held: Held | None = None, **smaller: int) -> BodyGate:
    return BodyGate(_echo, 100, smaller, 0.05, held or Held(1000))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_a_body_is_whole_or_refused(sizes: list[int]) -> None:
    held = Held(1000)
    status, body = asyncio.run(_call(_bodies(held), [b"x" * size for size in sizes]))
    assert (status, held.now) == (200 if sum(sizes) <= 100 else 413, 0)
    assert status == 413 or body == {"bytes": sum(sizes)}


def test_a_length_is_believed_at_once() -> None:
    for length, status in ((b"101", 413), (b"9" * 400, 413), (b"-1", 400), (b"x", 400)):
        assert asyncio.run(_call(_bodies(), [b"x"], headers=[(b"content-length", length)]))[0] == status
    short = _bodies(**{"/tokenize": 10})
    assert asyncio.run(_call(short, [b"x" * 11], path="/tokenize"))[0] == 413
    assert asyncio.run(_call(short, [b"x" * 11]))[0] == 200


def test_a_client_that_pauses_is_answered() -> None:
    status, body = asyncio.run(_call(_bodies(), [b"x"], open=True))
    assert status == 408
    assert "--asyncep-body-timeout-secs" in body["error"]["message"]


def test_a_process_that_stood_still_blames_nobody() -> None:
    """What came in time is read, though the time is over when this process comes to it."""

    async def run() -> int:
        asked, sent = asyncio.Event(), []

        async def receive() -> Any:
            asked.set()
            await arrived.wait()
            return {"type": "http.request", "body": b"x", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        arrived = asyncio.Event()
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        task = asyncio.create_task(_bodies()(scope, receive, send))
        await asked.wait()
        asyncio.get_running_loop().call_later(0.06, arrived.set)
        # Longer than the pause of 0.05 s that a client may make.
        time.sleep(0.2)
        await task
        return int(sent[0]["status"])

    assert asyncio.run(run()) == 200


def test_bodies_together_are_bounded() -> None:
    held = Held(1000, now=950)
    assert asyncio.run(_call(_bodies(held), [b"x" * 60]))[0] == 503
    assert asyncio.run(_call(_bodies(held), [b"x" * 50]))[0] == 200
    assert held.now == 950


def _raising(error: BaseException, *, sent: bool = False) -> Any:
    async def app(*_: Any) -> None:
        this = passage.get()
        assert this is not None
        this.sent = sent
        raise error

    return app


def _answering(status: int, content: Any, *, sent: bool = False) -> Any:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        this = passage.get()
        assert this is not None
        this.sent = sent
        await _answer(send, status, content)

    return app


_OURS = ("/generate",)


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError("deep"), OverflowError("int"), TypeError("str")])
def test_what_fails_before_a_rank_has_it_is_the_requests_fault(error: Exception) -> None:
    status, body = asyncio.run(_call(MistakesGate(_raising(error), _OURS), [b""]))
    assert status == 400
    assert type(error).__name__ in body["error"]["message"]
    with pytest.raises(type(error)):
        asyncio.run(_call(MistakesGate(_raising(error, sent=True), _OURS), [b""]))


def test_a_question_without_parameters_that_fails_is_the_servers_fault() -> None:
    async def app(*_: Any) -> None:
        raise ValueError("Invalid include sections")

    gate = MistakesGate(app, (), ("/v1/loads",))
    status, body = asyncio.run(_call(gate, [b""], "/v1/loads", query=b"include=null"))
    assert (status, "Invalid include" in body["error"]["message"]) == (400, True)
    with pytest.raises(ValueError, match="Invalid include"):
        asyncio.run(_call(gate, [b""], "/v1/loads"))


def test_errors_that_sglang_answers_are_told_apart() -> None:
    failed = {"message": "Internal server error: 'x'", "code": 500}
    status, body = asyncio.run(_call(MistakesGate(_answering(500, failed), _OURS), [b""]))
    assert (status, body["error"]["message"]) == (400, "the request cannot be read: 'x'")
    status, body = asyncio.run(_call(MistakesGate(_answering(500, failed, sent=True), _OURS), [b""]))
    assert (status, body) == (500, failed)
    status, body = asyncio.run(_call(MistakesGate(_answering(200, failed), _OURS), [b""]))
    assert (status, body) == (200, failed)
    refusal = MistakesGate(_raising(Refusal(429, "later")), _OURS)
    assert asyncio.run(_call(refusal, [b""]))[0] == 429


def test_errors_name_no_files_of_this_machine() -> None:
    text = '1 error\n\n  File "/opt/app/lib/x.py", line 3, in f\n    POST /v1/x'
    assert without_sources(text) == "1 error"
    assert without_sources("no /opt/app/lib/x.py there") == "no … there"
    assert without_sources("use /v1/score instead") == "use /v1/score instead"
    status, body = asyncio.run(_call(MistakesGate(_answering(400, {"message": text}), _OURS), [b""]))
    assert (status, body) == (400, {"message": "1 error"})


_SECRET_NAMES = ("api_key", "admin_api_key", "ssl_keyfile_password", "watermark_keys", "hf_token", "secret")


@given(st.sampled_from(_SECRET_NAMES), st.text(min_size=9), st.lists(st.sampled_from(["a", "b"]), max_size=3))
def test_no_secret_is_shown_however_deep(name: str, value: str, path: list[str]) -> None:
    tree: Any = {name: value, "max_total_tokens": 5, "tokenizer_path": "/models/x", "log_dir": "/var/log/x"}
    for key in path:
        tree = {key: [tree]}
    text = orjson.dumps(redacted(tree, paths=False)).decode()
    assert orjson.dumps(value).decode() not in text
    assert '"max_total_tokens":5' in text
    assert "/models/x" in text
    assert "/var/log/x" not in text
    assert "/var/log/x" in orjson.dumps(redacted(tree, paths=True)).decode()


@pytest.mark.parametrize("admin", [False, True])
def test_server_info_passes_without_secrets(admin: bool) -> None:
    shown = {"api_key": "k", "launch_command": "serve --api-key k", "dp_size": 2, "log_dir": "/var/log/x"}

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await _answer(send, 200, shown)

    async def run() -> Any:
        caller.set(Caller("x", admin=admin))
        return await _call(SecretsGate(app), [b""], path="/server_info")

    _, body = asyncio.run(run())
    assert body == {"api_key": "***", "dp_size": 2, "log_dir": "/var/log/x" if admin else "***"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1/models/x", "/v1/modelsx", "/generate"])
@pytest.mark.parametrize("most", [None, 7])
def test_model_cards_have_the_length_that_is_accepted(path: str, most: int | None) -> None:
    card = {"id": "x", "max_model_len": 10, "root": "x"}
    shown = {"object": "list", "data": [card, {"id": "adapter", "max_model_len": None}]} if path[-1] != "x" else card

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await _answer(send, 200, shown)

    async def run() -> Any:
        return await _call(ModelCardsGate(app, lambda: most), [b""], path=path)

    _, body = asyncio.run(run())
    told = body["data"][0] if "data" in body else body
    touched = most is not None and path.rstrip("/") in ("/v1/models", "/v1/models/x")
    assert told == {**card, "max_model_len": most if touched else 10}
    assert "data" not in body or body["data"][1]["max_model_len"] is None


def test_keys_are_handed_on_unseen() -> None:
    from asyncep_router.keys import Keys

    keys = Keys.of("client", "boss")
    segment = hand_on(keys)
    assert read_keys(segment.path) == keys
    segment.close()
    empty = hand_on(Keys())
    assert not read_keys(empty.path)
    empty.close()
    assert without_keys({"ASYNCEP_API_KEY": "k", "ASYNCEP_ADMIN_API_KEY": "k", "HOME": "/"}) == {"HOME": "/"}


@pytest.fixture
def slow_server() -> Iterator[int]:
    """A uvicorn server with at most three connections, half a second for headers and a second in which something of an
    answer is to be taken; answers its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(_echo_or_long, http=limited(3, 0.5, 1.0), log_level="error", lifespan="off")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()


def _read_all(line: socket.socket) -> bytes:
    line.settimeout(20)
    text = b""
    while part := line.recv(4096):
        text += part
    return text


def test_half_open_connections_end_and_others_are_served(slow_server: int) -> None:
    address = ("127.0.0.1", slow_server)
    with httpx.Client(base_url=f"http://127.0.0.1:{slow_server}") as honest:
        assert honest.post("/", content=b"abc").json() == {"bytes": 3}
        silent, half = socket.create_connection(address), socket.create_connection(address)
        half.sendall(b"POST / HTTP/1.1\r\nhost: x\r\n")
        extra = socket.create_connection(address)
        assert b" 503 " in _read_all(extra)
        # One byte now and then keeps nobody's place.
        stop = time.monotonic() + 20
        while time.monotonic() < stop:
            try:
                half.sendall(b"x")
            except OSError:
                break
            half.settimeout(0.05)
            try:
                if half.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                continue
        assert b" 408 " in _read_all(half)
        assert b" 408 " in _read_all(silent)
        assert honest.post("/", content=b"abc").json() == {"bytes": 3}


def _ask_for_much(port: int) -> socket.socket:
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    line.connect(("127.0.0.1", port))
    line.sendall(b"POST /long HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
    return line


def test_an_answer_that_nobody_takes_is_given_up(slow_server: int) -> None:
    silent = [_ask_for_much(slow_server) for _ in range(2)]
    with httpx.Client(base_url=f"http://127.0.0.1:{slow_server}") as honest:
        assert honest.post("/", content=b"abc").json() == {"bytes": 3}
    # All three places are free again, though nobody has hung up.
    deadline = time.monotonic() + 20
    while True:
        lines = [socket.create_connection(("127.0.0.1", slow_server)) for _ in range(3)]
        try:
            for line in lines:
                line.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            if all(b" 200 " in _read_all(line) for line in lines):
                break
        except ConnectionError:
            pass  # one too many: it was closed with its request unread
        finally:
            for line in lines:
                line.close()
        assert time.monotonic() < deadline
    for line in silent:
        line.close()


def test_an_answer_that_is_taken_slowly_comes_whole(slow_server: int) -> None:
    with _ask_for_much(slow_server) as line:
        line.settimeout(20)
        taken, began = 0, time.monotonic()
        while taken < LONG_ANSWER:
            part = line.recv(1 << 16)
            assert part, f"cut off after {taken} bytes"
            taken += len(part)
            # In all some four times as long as a client may pause.
            time.sleep(max(0.0, began + 4.0 * taken / LONG_ANSWER - time.monotonic()))
