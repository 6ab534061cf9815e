"""One request over a connection of its own, byte by byte as it was made up, and what came back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from urllib.parse import urlsplit

from hostile.cases import Case
from hostile.oracle import Outcome

_CONNECT_SECONDS = 10.0
# No answer is longer; what is would be kept whole in this process.
_MOST_BYTES = 64 << 20


async def send(url: str, case: Case, key: str | None = None) -> Outcome:
    """Sends ``case`` to the server at ``url`` and reads its answer to the end."""
    began = time.monotonic()

    def outcome(
        status: int | None, headers: dict[str, str] | None = None, body: bytes = b"", error: str = ""
    ) -> Outcome:
        return Outcome(status, headers or {}, body, error, time.monotonic() - began)

    try:
        async with asyncio.timeout(case.patience):
            status, headers, body = await _exchange(url, case, key)
            return outcome(status, headers, body)
    except TimeoutError:
        return outcome(None, error="timeout")
    except asyncio.IncompleteReadError as error:
        return outcome(None, error="closed in the middle" if error.partial else "closed")
    except (OSError, ValueError, asyncio.LimitOverrunError) as error:
        return outcome(None, error=type(error).__name__)


async def _exchange(url: str, case: Case, key: str | None) -> tuple[int | None, dict[str, str], bytes]:
    where = urlsplit(url)
    connecting = asyncio.open_connection(where.hostname, where.port, limit=1 << 20)
    reader, writer = await asyncio.wait_for(connecting, _CONNECT_SECONDS)
    try:
        message = _message(case, where.netloc, key)
        writer.write(message if case.manner != "cut" else message[: -max(1, len(case.content) // 2)])
        # A server may answer and close before it has read all of a body that is too long.
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        return (None, {}, b"") if case.manner != "whole" else await _answer(reader, case.method)
    finally:
        writer.close()


def _message(case: Case, host: str, key: str | None) -> bytes:
    headers = {"host": host, "connection": "close", "content-type": "application/json"}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    headers |= dict(case.headers)
    if case.body is not None:
        headers["content-length"] = str(len(case.content))
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{case.method} {case.path}{case.query} HTTP/1.1\r\n{head}\r\n".encode("latin-1", "replace") + case.content


async def _answer(reader: asyncio.StreamReader, method: str) -> tuple[int, dict[str, str], bytes]:
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status = int(head.split(" ", 2)[1])
        if status >= 200:
            break
    lines = (line.partition(":") for line in head.split("\r\n")[1:] if line)
    headers = {name.strip().lower(): value.strip() for name, _, value in lines}
    if method == "HEAD" or status in (204, 304):
        return status, headers, b""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return status, headers, await _chunks(reader)
    if "content-length" in headers:
        return status, headers, await reader.readexactly(min(int(headers["content-length"]), _MOST_BYTES))
    return status, headers, await reader.read(_MOST_BYTES)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    found = bytearray()
    while True:
        length = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        found += await reader.readexactly(length)
        await reader.readexactly(2)
        if length == 0 or len(found) > _MOST_BYTES:
            return bytes(found)
