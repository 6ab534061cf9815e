"""Clients' connections: how many there may be, and how long each may take to say what it wants and take the answer."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aiohttp import web

from asyncep_router.http.errors import BadRequest, ClientGone, ExpectationFailed, SlowBody, TooLarge, TooManyBodies

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from aiohttp.web_protocol import RequestHandler

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b"
)
_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b"
)
_FULL_BODY = (
    b'{"error":{"type":"service_error","code":"too_many_connections",'
    b'"message":"the router has as many connections as it takes (--max-connections)"}}'
)
_SLOW_BODY = (
    b'{"error":{"type":"invalid_request_error","code":"header_timeout",'
    b'"message":"the request\'s headers did not arrive in time (--header-timeout-secs)"}}'
)
# A body may take one more second for so many bytes that have come.
_SLOWEST_BYTES = 16384
# Python's objects for what JSON holds: an entry of a list, and a list or object itself.
# A moment in which this process stood still must not count against clients: when time is up, what has arrived in the
# meantime is read first.
_GRACE_SECONDS = 0.5
_BYTES_AN_ENTRY = 36
_BYTES_A_LIST = 80
# After an answer that left part of a body unread, aiohttp reads on for so long, so that the client sees the answer.
# An event loop's clock has whole milliseconds: it may wake so much too early.
_TICK_SECONDS = 0.001
_LINGERING_SECONDS = 2.0


class LimitedServer(web.Server):
    """aiohttp's low-level server with bounds: on connections, on the time until a connection's first request, and on
    the time for which a client takes nothing of what it is sent.

    Between requests `keep_alive` is the bound, for headers that come slowly too.
    """

    def __init__(
        self,
        handler: Any,
        *,
        most: int,
        header_seconds: float,
        keep_alive: float,
        taking_seconds: float,
        **options: Any,
    ) -> None:
        super().__init__(
            handler,
            request_factory=self._request,
            # aiohttp counts a connection's first request as one that waits between others.
            keepalive_timeout=keep_alive,
            lingering_time=_LINGERING_SECONDS,
            **options,
        )
        self._most = most
        self._header_seconds = header_seconds
        self._taking_milliseconds = int(taking_seconds * 1000)
        self._open = 0
        self._silent: dict[RequestHandler, asyncio.TimerHandle] = {}

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """A client connected."""
        super().connection_made(handler, transport)
        self._open += 1
        if self._open > self._most:
            _close(transport, _FULL % (len(_FULL_BODY), _FULL_BODY))
            return
        # Closing waits until what was written is taken: only the kernel ends a connection whose client reads nothing.
        connection = transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._taking_milliseconds)
        loop = asyncio.get_running_loop()
        self._silent[handler] = loop.call_later(self._header_seconds, self._late, handler, transport)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """It is closed."""
        self._open -= 1
        self._heard(handler)
        super().connection_lost(handler, exc)

    def _request(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        """A request whose headers are there."""
        self._heard(protocol)
        return web.BaseRequest(message, payload, protocol, writer, task, asyncio.get_running_loop())

    def _heard(self, handler: RequestHandler) -> None:
        timer = self._silent.pop(handler, None)
        if timer is not None:
            timer.cancel()

    def _late(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        self._silent[handler] = loop.call_later(_GRACE_SECONDS, self._too_slow, handler, transport)

    def _too_slow(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        self._silent.pop(handler, None)
        _close(transport, _SLOW % (len(_SLOW_BODY), _SLOW_BODY))


def _close(transport: asyncio.Transport, answer: bytes) -> None:
    if not transport.is_closing():
        transport.write(answer)
        transport.close()


def weight(raw: bytes) -> int:
    """About how many bytes of memory a JSON body takes beside its own once it is parsed."""
    return _BYTES_AN_ENTRY * raw.count(b",") + _BYTES_A_LIST * (raw.count(b"[") + raw.count(b"{"))


class Bodies:
    """Reads bodies: `most` bytes each, `held` bytes of all together, each within `seconds` and a little by size."""

    def __init__(self, most: int, held: int, seconds: float) -> None:
        self._most = most
        self._held = held
        self._seconds = seconds
        self.now = 0
        """Bytes held, what they take once they are parsed included."""

    @asynccontextmanager
    async def read(self, request: web.BaseRequest) -> AsyncIterator[bytes]:
        """A request's body, held while the context is open.

        A client that waits for `100 Continue` gets it once nothing in its headers stands against the request.

        Raises `TooLarge`, `TooManyBodies`, `SlowBody`, `ExpectationFailed`, `BadRequest` (broken compression).
        """
        length = request.content_length or 0
        if length > self._most:
            raise self._too_large()
        if self.now + length > self._held:
            raise self._too_many()
        await self._continue(request)
        taken = 0
        try:
            parts: list[bytes] = []
            async for part in self._parts(request):
                parts.append(part)
                taken += len(part)
                self.now += len(part)
                if taken > self._most:
                    raise self._too_large()
                if self.now > self._held:
                    raise self._too_many()
            raw = b"".join(parts)
            del parts
            parsed = weight(raw)
            if self.now + parsed > self._held:
                raise self._too_many()
            taken += parsed
            self.now += parsed
            yield raw
        finally:
            self.now -= taken

    async def _parts(self, request: web.BaseRequest) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._seconds
        late = False
        while True:
            try:
                async with asyncio.timeout_at(due):
                    part = await request.content.readany()
            except TimeoutError:
                if late:
                    raise SlowBody("the body did not arrive in time (--body-timeout-secs)") from None
                late = True
                due = loop.time() + _GRACE_SECONDS
                continue
            except web.RequestPayloadError as error:
                raise BadRequest(f"the body could not be read: {error}") from error
            if not part:
                return
            due += len(part) / _SLOWEST_BYTES
            yield part

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is too large: --max-payload-size is {self._most}")

    def _too_many(self) -> TooManyBodies:
        return TooManyBodies("the bodies of other requests fill the router's memory (--max-held-bytes); send it again")

    @staticmethod
    async def _continue(request: web.BaseRequest) -> None:
        expected = request.headers.get("Expect")
        if expected is None or request.version < (1, 1):
            return
        if expected.strip().lower() != "100-continue":
            raise ExpectationFailed("Expect: only 100-continue is known")
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # What was written belongs to no answer.
        request.writer.output_size = 0


async def in_time(request: web.BaseRequest, step: Awaitable[Any], seconds: float) -> None:
    """Await a step of sending an answer. Raises `ClientGone` if the client takes nothing for so long, or left."""
    sending = asyncio.ensure_future(step)
    left = None
    try:
        while not (await asyncio.wait([sending], timeout=seconds / 2 + _TICK_SECONDS))[0]:
            now = request.transport.get_write_buffer_size() if request.transport is not None else 0
            if now == left:
                raise TimeoutError
            left = now
        sending.result()
    except (ConnectionError, TimeoutError) as error:
        if request.transport is not None:
            request.transport.abort()
        raise ClientGone(f"the client does not take its answer: {type(error).__name__}") from error
    finally:
        sending.cancel()
