"""A worker without a model: speaks SGLang's endpoints, answers at once, or when a gate opens.

Run as a process; prints its port. What it does is changed over HTTP:
`POST /null/close` parks requests, `/null/open` releases them; `POST /null/mode` with `ok`, `hang` (answers
nothing at all any more, keeps connections open), `deaf` (serves, but answers no question about itself) or a status to
answer with; `GET /null` counts.
The answer to a prompt carries the sum of its token ids, so that a mixed-up answer is found out.
A prompt that begins with `POISON` plus a status is answered with that status by every worker; `POISON` alone breaks
the connection, `POISON` + 1 is never answered, `POISON` + 2 is a 500 of a request in quarantine. `WEAK` is a 500 from
a worker started with `--weak` only. Questions of the router's own are counted apart (`questions`).
With `--api-key` it wants that key, as a server does. The keys that came with requests are kept (`keys` in counts).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

import orjson
import uvloop

POISON = 10**6
WEAK = 2 * 10**6


class State:
    """What all connections share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.mode = options.mode
        self.open = asyncio.Event()
        self.open.set()
        self.parked = 0
        self.seen = 0
        self.questions = 0
        self.prompts = 0
        self.answered = 0
        self.aborted = 0
        self.by_rank: dict[str, int] = {}
        self.keys: dict[str, int] = {}
        self.headers: list[str] = []

    def counts(self) -> dict[str, Any]:
        names = ("parked", "seen", "questions", "prompts", "answered", "aborted", "by_rank", "keys", "headers")
        return {name: getattr(self, name) for name in names}


def dechunk(data: bytes) -> bytes:
    """The body of a chunked message."""
    body = bytearray()
    while data:
        size, _, data = data.partition(b"\r\n")
        body += data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]
    return bytes(body)


class Connection(asyncio.Protocol):
    """One client connection; requests on it come one after another."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.buffer = bytearray()
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        if self.task is not None and not self.task.done():
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.buffer[:end])
        if b"transfer-encoding: chunked" in head.lower():
            if self.buffer.endswith(b"\r\n0\r\n\r\n"):
                body = dechunk(bytes(self.buffer[end + 4 :]))
                self.buffer.clear()
                method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
                self.receive(method, path, body, head)
            return
        at = head.lower().find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self.buffer) < end + 4 + length:
            return
        body = bytes(self.buffer[end + 4 : end + 4 + length])
        del self.buffer[: end + 4 + length]
        line = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        if len(line) != 3 or line[0] == "PRI":  # somebody asks whether we speak HTTP/2
            self.transport.close()
            return
        method, path, _ = line
        self.receive(method, path, body, head)

    def receive(self, method: str, path: str, body: bytes, head: bytes) -> None:
        state = self.state
        if path.startswith("/null"):
            self.answer(200, self.control(path, body))
            return
        names = dict(part.split(": ", 1) for part in head.decode("latin-1").split("\r\n")[1:])
        fields = {name.lower(): value for name, value in names.items()}
        key = fields.get("authorization", "").removeprefix("Bearer ")
        state.keys[key] = state.keys.get(key, 0) + 1
        state.headers = sorted(fields)
        wanted = state.options.api_key
        if state.mode == "hang" or (state.mode == "deaf" and method == "GET"):
            return
        if state.mode == "deaf_info" and path.endswith("server_info"):
            return
        if wanted and key != wanted and path != "/health":
            self.answer(401, b'{"error":{"message":"no"}}')
        elif method == "POST" and path in ("/generate", "/v1/score", "/v1/completions", "/v1/embeddings"):
            if fields.get("x-request-id") == "asyncep-router-question":
                state.questions += 1
            else:
                state.seen += 1
            if state.open.is_set():
                self.infer(path, body)
            else:
                self.task = asyncio.create_task(self.park(path, body))
        else:
            self.answer(200, orjson.dumps(self.describe(path)))

    def control(self, path: str, body: bytes) -> bytes:
        state = self.state
        if path == "/null/close":
            state.open.clear()
        elif path == "/null/open":
            state.open.set()
        elif path == "/null/mode":
            state.mode = body.decode()
        return orjson.dumps(state.counts())

    def describe(self, path: str) -> dict[str, Any]:
        options = self.state.options
        if path in ("/model_info", "/get_model_info"):
            return {"model_path": options.model_path, "served_model_name": "null", "is_generation": True}
        if path in ("/server_info", "/get_server_info"):
            return {
                "dp_size": options.dp_size,
                "chunked_prefill_size": options.chunk,
                "version": "null",
                "api_key": options.api_key or "an-unused-key",
                "admin_api_key": "the-admin-key",
                "tokenizer_path": "/srv/models/null",
                "launch": {"command": f"serve --api-key {options.api_key}", "hf_token": "hf_abc"},
            }
        return {}

    async def park(self, path: str, body: bytes) -> None:
        self.state.parked += 1
        try:
            await self.state.open.wait()
        except asyncio.CancelledError:
            self.state.aborted += 1
            raise
        finally:
            self.state.parked -= 1
        self.infer(path, body)

    def poisoned(self, body: bytes) -> bool:
        """Whether it is a prompt that harms, which is then dealt with."""
        found = orjson.loads(body).get("input_ids") or [0]
        first = found[0][0] if isinstance(found[0], list) else found[0]
        if first == WEAK and self.state.options.weak:
            first = POISON + 500
        if not POISON <= first < POISON + 600:
            return False
        if first == POISON:
            self.transport.abort()
        elif first == POISON + 2:
            self.answer(500, b'{"error":{"message":"this request is quarantined"}}')
        elif first != POISON + 1:
            self.answer(first - POISON, b'{"error":{"message":"poison"}}')
        return True

    def infer(self, path: str, body: bytes) -> None:
        state = self.state
        state.answered += 1
        if not state.options.blind and self.poisoned(body):
            return
        if state.mode.isdigit():
            self.answer(int(state.mode), b'{"error":{"message":"as told"}}')
        elif state.options.blind:
            self.answer(200, b'{"text":"","meta_info":{"id":"x","prompt_tokens":1,"cached_tokens":0}}')
        else:
            fields = orjson.loads(body)
            rank = str(fields.get("routed_dp_rank"))
            ids = fields.get("input_ids") or [0]
            prompts = ids if isinstance(ids[0], list) else [ids]
            state.prompts += len(prompts)
            state.by_rank[rank] = state.by_rank.get(rank, 0) + len(prompts)
            answers = [
                {"text": "", "meta_info": {"prompt_tokens": len(prompt), "cached_tokens": 0, "sum": sum(prompt)}}
                for prompt in prompts
            ]
            if fields.get("stream"):
                self.stream(answers[0])
            else:
                self.answer(200, orjson.dumps(answers if isinstance(ids[0], list) else answers[0]))

    def stream(self, answer: dict[str, Any]) -> None:
        event = b"data: " + orjson.dumps(answer) + b"\n\n"
        chunks = (event, event, b"data: [DONE]\n\n")
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        self.transport.write(head + body + b"0\r\n\r\n")

    def answer(self, status: int, body: bytes) -> None:
        head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
        self.transport.write(head + body)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--host", help="taken and ignored")
    parser.add_argument("--dp-size", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--model-path", default="/nowhere")
    parser.add_argument("--api-key")
    parser.add_argument("--mode", default="ok")
    parser.add_argument("--weak", action="store_true", help="fails at WEAK")
    parser.add_argument("--blind", action="store_true", help="answer without reading")
    state = State(parser.parse_args())
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(state), "127.0.0.1", state.options.port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    # The parent's end of our standard input closes when it ends, however it ends.
    await loop.run_in_executor(None, sys.stdin.buffer.read)
    server.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
