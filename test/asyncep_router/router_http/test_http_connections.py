"""Connections, bodies and answers: bounded in number, size and time; clients that wait for `100 Continue` get it."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import httpx
import psutil
import pytest

from asyncep_router.errors import ConfigError
from asyncep_router.http.bounds import check_prompts
from asyncep_router.http.connections import in_time, weight
from asyncep_router.http.errors import BadRequest, ClientGone
from asyncep_router.http.flags import parse
from router_http.harness import NullWorker, RouterProcess, prompts, wait_for

Workers = Callable[..., NullWorker]
Routers = Callable[..., RouterProcess]

LARGEST = 3_000_000
FLAGS = (
    f"--api-key secret-key --max-payload-size {LARGEST} --max-held-bytes 20000000 --header-timeout-secs 1 "
    "--body-timeout-secs 1 --keep-alive-timeout-secs 2 --max-prompts 50 --max-connections 300"
)
KEY = {"Authorization": "Bearer secret-key"}


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    worker = NullWorker()
    process = RouterProcess(worker.url, flags=FLAGS, log=tmp_path_factory.mktemp("bounded") / "log")
    process.key = "secret-key"
    try:
        yield process.ready(1)
    finally:
        process.stop()
        worker.stop()


def exchange(process: RouterProcess, head: str, *later: bytes) -> list[bytes]:
    """What comes after the head, and after each later part; the connection is closed then."""
    answers = []
    with socket.create_connection(("127.0.0.1", process.port), timeout=30) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n")
        answers.append(connection.recv(65536))
        for part in later:
            connection.sendall(part)
            answers.append(connection.recv(65536))
    return answers


# 100-continue


@pytest.mark.parametrize("expected", ["100-continue", "100-Continue"])
def test_who_waits_to_send_is_told_to(bounded: RouterProcess, expected: str) -> None:
    body = json.dumps({"input_ids": [1, 2, 3]}).encode()
    head = (
        f"POST /generate HTTP/1.1\nHost: x\nAuthorization: bearer secret-key\nExpect: {expected}\n"
        f"Content-Length: {len(body)}"
    )
    first, second = exchange(bounded, head, body)
    assert first == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert second.startswith(b"HTTP/1.1 200 ")
    assert b'"sum":6' in second


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ("POST /generate HTTP/1.1\nContent-Length: 10", 401),
        ("POST /generate HTTP/1.1\nAuthorization: Bearer wrong\nContent-Length: 10", 401),
        (f"POST /generate HTTP/1.1\nAuthorization: Bearer secret-key\nContent-Length: {LARGEST + 1}", 413),
        ("POST /nowhere HTTP/1.1\nAuthorization: Bearer secret-key\nContent-Length: 10", 404),
        ("POST /health HTTP/1.1\nAuthorization: Bearer secret-key\nContent-Length: 10", 405),
        ("POST /workers HTTP/1.1\nAuthorization: Bearer secret-key\nContent-Length: 10", 403),
        (f"POST /tokenize HTTP/1.1\nAuthorization: Bearer secret-key\nContent-Length: {LARGEST + 1}", 413),
    ],
)
def test_who_would_be_refused_need_not_send(bounded: RouterProcess, lines: str, status: int) -> None:
    (answer,) = exchange(bounded, f"{lines}\nHost: x\nExpect: 100-continue")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    # What the client sends next must not be taken for a request.
    assert b"connection: close" in answer.lower()


def test_other_expectations_are_refused(bounded: RouterProcess) -> None:
    (answer,) = exchange(
        bounded, "POST /generate HTTP/1.1\nHost: x\nAuthorization: Bearer secret-key\nExpect: cake\nContent-Length: 2"
    )
    assert answer.startswith(b"HTTP/1.1 417 ")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_with_a_large_body(bounded: RouterProcess) -> None:
    """curl waits for 100 Continue with bodies over 1 MB, for up to a second."""
    body = json.dumps({"input_ids": list(range(350_000))})
    assert 2_000_000 < len(body) < LARGEST
    command = ["curl", "-sS", "-v", "-X", "POST", bounded.url + "/generate", "--data-binary", "@-"]
    # Longer than a test may take: without 100 Continue it would fail by the test's own limit.
    command += ["--expect100-timeout", "600", "-H", "Expect: 100-continue"]
    command += ["-H", "Authorization: bearer secret-key", "-H", "Content-Type: application/json"]
    done = subprocess.run(command, input=body.encode(), capture_output=True, timeout=120, check=True)
    assert json.loads(done.stdout)["meta_info"]["prompt_tokens"] == 350_000
    assert b"100 Continue" in done.stderr


# Slow clients, many clients


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b"408"),
        (b"POST /gen", b"408"),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"408"),
        (
            b"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret-key\r\nContent-Length: 9\r\n\r\n{",
            b"408",
        ),
    ],
)
def test_who_does_not_go_on_is_let_go(bounded: RouterProcess, sent: bytes, status: bytes) -> None:
    with socket.create_connection(("127.0.0.1", bounded.port), timeout=60) as connection:
        connection.sendall(sent)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"timeout" in answer


def test_a_drip_is_no_progress(bounded: RouterProcess) -> None:
    """A byte now and then keeps no connection: what counts is the time in all."""
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret-key\r\nContent-Length: 100000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", bounded.port), timeout=0.1) as connection:
        connection.sendall(head)

        def over() -> bool:
            try:
                connection.sendall(b" ")
                return bool(connection.recv(65536).startswith(b"HTTP/1.1 408"))
            except TimeoutError:
                return False
            except ConnectionError:  # closed between two bytes, the answer unread
                return True

        wait_for(over, "given up")


def test_half_open_connections_do_not_stay(bounded: RouterProcess) -> None:
    """Others are served beside them, and then they are gone, from the router's side."""
    process = psutil.Process(bounded.process.pid)

    def open_connections() -> int:
        found = process.net_connections("tcp")
        return sum(entry.status == psutil.CONN_ESTABLISHED and entry.laddr.port == bounded.port for entry in found)

    wait_for(lambda: open_connections() == 0, "those of other tests closed")
    half_open = [socket.create_connection(("127.0.0.1", bounded.port)) for _ in range(250)]
    try:
        for connection in half_open[::2]:
            connection.sendall(b"POST /generate HTTP/1.1\r\nHost:")
        for number in range(20):
            answer = bounded.post("/generate", {"input_ids": [number]}, headers=KEY)
            assert answer.status_code == 200
        wait_for(lambda: open_connections() == 0, "let go")
    finally:
        for connection in half_open:
            connection.close()


def test_more_connections_than_allowed_are_told_so(bounded: RouterProcess) -> None:
    connections = [socket.create_connection(("127.0.0.1", bounded.port), timeout=30) for _ in range(330)]
    try:
        answers = [connection.recv(65536) for connection in connections[-5:]]
    finally:
        for connection in connections:
            connection.close()
    assert any(answer.startswith(b"HTTP/1.1 503 ") and b"--max-connections" in answer for answer in answers)

    def served() -> bool:
        return bounded.post("/generate", {"input_ids": [1]}, headers=KEY).status_code == 200

    wait_for(served, "served again")


def test_an_answer_that_nobody_takes_is_dropped(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    process = router(worker.url, flags="--body-timeout-secs 1").ready(1)
    body = json.dumps({"input_ids": [[number % 7] for number in range(4000)]}).encode()
    clients = []
    for _ in range(3):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", process.port))
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        clients.append(client)
    own = psutil.Process(process.process.pid)

    def gone() -> bool:
        established = [entry for entry in own.net_connections("tcp") if entry.status == psutil.CONN_ESTABLISHED]
        return worker.counts["prompts"] == 3 * 4000 and not any(e.laddr.port == process.port for e in established)

    wait_for(gone, "dropped")
    for client in clients:
        client.close()


# Bodies


def test_bounds_name_the_field(bounded: RouterProcess) -> None:
    for path, fields, name in (
        ("/generate", {"input_ids": [[1]] * 51}, "input_ids"),
        ("/generate", {"text": ["a"] * 51}, "text"),
        ("/v1/completions", {"prompt": ["a"] * 51}, "prompt"),
        ("/v1/embeddings", {"input": ["a"] * 51}, "input"),
        ("/v1/score", {"query": "q", "items": ["a"] * 51}, "items"),
        ("/v1/rerank", {"query": "q", "documents": ["a"] * 51}, "documents"),
    ):
        answer = bounded.post(path, fields, headers=KEY)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(f"{name}: 51 prompts")
        assert "--max-prompts" in answer.text


def test_one_prompt_of_many_tokens_is_one_prompt() -> None:
    assert check_prompts("/generate", {"input_ids": [1] * 100}, 50) == 1
    assert check_prompts("/generate", {"input_ids": [[1]] * 50}, 50) == 50
    assert check_prompts("/v1/completions", {"prompt": "a"}, 50) == 1
    assert check_prompts("/v1/score", {"items": "a"}, 50) == 1
    with pytest.raises(BadRequest, match="items: 51"):
        check_prompts("/v1/score", {"items": [1, *["a"] * 51][1:]}, 50)


def test_bodies_of_all_clients_are_bounded_together(bounded: RouterProcess) -> None:
    # Parsed, it would take far more memory than it has bytes.
    body = b'{"input_ids":[%b[1]]}' % (b"[1]," * 300_000)
    assert len(body) < LARGEST < 20_000_000 < weight(body)
    answer = httpx.post(bounded.url + "/generate", content=body, headers=KEY, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_bodies")
    assert bounded.post("/generate", {"input_ids": [1]}, headers=KEY).status_code == 200


def chunked(body: bytes) -> Iterator[bytes]:
    yield body


@pytest.mark.parametrize("encoded", [False, True], ids=["chunked", "deflated"])
def test_bodies_are_bounded_however_they_come(bounded: RouterProcess, encoded: bool) -> None:
    body = b" " * (LARGEST + 1)
    headers = dict(KEY)
    if encoded:
        body = zlib.compress(body)
        headers["Content-Encoding"] = "deflate"
    answer = httpx.post(bounded.url + "/generate", content=chunked(body), headers=headers, timeout=60)
    assert answer.status_code == 413


def test_compressed_bodies_are_served(bounded: RouterProcess) -> None:
    headers = {**KEY, "Content-Encoding": "deflate"}
    answer = httpx.post(bounded.url + "/generate", content=zlib.compress(b'{"input_ids":[4,5]}'), headers=headers)
    assert answer.json()["meta_info"]["sum"] == 9
    broken = httpx.post(bounded.url + "/generate", content=b"no deflate", headers=headers)
    assert broken.status_code == 400


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'"x"', b"5", b"null", b"{", b"\xff", b'{"a":' * 2000, b"[" * 100_000, b'{"a":"\\ud800"}']
)
@pytest.mark.parametrize("path", ["/generate", "/v1/score", "/v1/rerank"])
def test_what_is_no_object_is_a_400(bounded: RouterProcess, path: str, body: bytes) -> None:
    answer = httpx.post(bounded.url + path, content=body, headers=KEY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")


def test_odd_bytes_in_paths_and_headers(bounded: RouterProcess) -> None:
    for line in ("GET /%FF%00 HTTP/1.1", "GET /\xff HTTP/1.1", "GET /a?url=%ff HTTP/1.1", "PURGE /generate HTTP/1.1"):
        (answer,) = exchange(bounded, f"{line}\nHost: x\nX-Request-Id: \xff\xfe\nOrigin: \xff")
        assert answer[9:10] == b"4", answer
    (answer,) = exchange(bounded, "GET /health HTTP/1.1\nHost: x\nX-Request-Id: \xff\nOrigin: \xff")
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "line", ["--max-prompts 0", "--max-connections 0", "--header-timeout-secs 0", "--body-timeout-secs -1"]
)
def test_bounds_that_are_none(line: str) -> None:
    with pytest.raises(ConfigError, match=line.split()[0]):
        parse(line.split())


def test_load_beside_hostile_clients(bounded: RouterProcess) -> None:
    """Requests of a well-behaved client are all answered while others do everything above at once."""
    hostile = [socket.create_connection(("127.0.0.1", bounded.port)) for _ in range(100)]
    for number, connection in enumerate(hostile):
        connection.sendall(
            [b"GET", b"POST /generate HTTP/1.1\r\nContent-Length: 10\r\n\r\n{", b"\x16\x03\x01\x00", b"\r\n" * 50][
                number % 4
            ]
        )
    statuses = [bounded.post("/generate", {"input_ids": ids}, headers=KEY).status_code for ids in prompts(30)]
    assert set(statuses) == {200}
    for connection in hostile:
        connection.close()


# Answers


class Slow:
    """A client's side of a connection that has much to take: what is left of it at each look."""

    def __init__(self, left: list[int]) -> None:
        self._left = left
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        return self._left.pop(0) if len(self._left) > 1 else self._left[0]

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("left", [[5], [9, 7, 5, 5], [0]])
def test_an_answer_of_which_nothing_is_taken_is_given_up(left: list[int]) -> None:
    async def run() -> None:
        transport = Slow(left)
        began = time.monotonic()
        with pytest.raises(ClientGone):
            await in_time(SimpleNamespace(transport=transport), asyncio.sleep(60), 0.1)  # type: ignore[arg-type]
        assert transport.aborted
        assert time.monotonic() - began >= 0.1

    asyncio.run(run())


def test_an_answer_that_is_taken_slowly_is_not_given_up() -> None:
    async def run() -> None:
        transport = Slow(list(range(100, 0, -1)))
        await in_time(SimpleNamespace(transport=transport), asyncio.sleep(0.6), 0.1)  # type: ignore[arg-type]
        assert not transport.aborted

    asyncio.run(run())


def test_a_step_that_is_no_longer_wanted_ends() -> None:
    async def run() -> None:
        ended = asyncio.Event()

        async def step() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        task = asyncio.create_task(in_time(SimpleNamespace(transport=Slow([5, 4, 3, 2])), step(), 60))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(ended.wait(), 5)

    asyncio.run(run())
