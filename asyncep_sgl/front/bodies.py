"""Bodies of requests: bounded in bytes and in time before anything reads them as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncep_sgl.front.asgi import Refusal, header, refuse

# Its body goes to disk as it comes; `batches` bounds it.
_STREAMED = ("/v1/files",)

_GRACE_SECONDS = 1.0


@dataclass
class Held:
    """Bytes of all bodies that the front holds now."""

    most: int
    now: int = 0


@dataclass
class BodyGate:
    """ASGI middleware: reads a request's body, as much and as long as allowed, and passes it on in one piece.

    Attributes:
        most: bytes of one body.
        smaller: by path, bytes of a body there, where that is less.
        pause: seconds between two parts of a body.
        held: bytes of all of them together.
    """

    app: ASGIApp
    most: int
    smaller: Mapping[str, int]
    pause: float
    held: Held
    _streamed: frozenset[str] = field(default=frozenset(_STREAMED))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or refuses it with 400, 408, 413 or 503."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS", "DELETE"):
            await self.app(scope, receive, send)
            return
        if scope["path"] in self._streamed:
            await self.app(scope, self._in_time(receive), send)
            return
        held = 0
        most = self.smaller.get(scope["path"], self.most)
        try:
            self._check_length(header(scope, b"content-length"), most)
            parts: list[bytes] = []
            async for part in self._parts(receive):
                if self.held.now + len(part) > self.held.most:
                    raise Refusal(
                        503,
                        "bodies of other requests fill the front's memory (--asyncep-max-held-bytes); send it again",
                        {"retry-after": "1", "connection": "close"},
                    )
                held += len(part)
                self.held.now += len(part)
                if held > most:
                    raise self._too_large(most)
                parts.append(part)
            await self.app(scope, replay(b"".join(parts), receive), send)
        except Refusal as refusal:
            await refuse(send, refusal)
        except _Gone:
            return
        finally:
            self.held.now -= held

    def _check_length(self, length: str | None, most: int) -> None:
        if length is None:
            return
        if not length.isdecimal():
            raise Refusal(400, f"Content-Length: {length[:80]!r} is not a number of bytes", {"connection": "close"})
        if int(length[:20]) > most:
            raise self._too_large(most)

    def _too_large(self, most: int) -> Refusal:
        flag = "--asyncep-max-body-bytes" if most == self.most else "--asyncep-max-prompt-chars, in JSON"
        advice = "send several requests" if most == self.most else "the model's context holds no more"
        return Refusal(413, f"the body has more than {most} bytes ({flag}); {advice}", {"connection": "close"})

    async def _parts(self, receive: Receive) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self._message(receive)
            if message["type"] == "http.disconnect":
                raise _Gone
            yield message.get("body", b"")
            more = message.get("more_body", False)

    async def _message(self, receive: Receive) -> Message:
        try:
            return await self._next(receive)
        except TimeoutError:
            raise Refusal(
                408,
                f"no part of the body came for {self.pause:g} s (--asyncep-body-timeout-secs); send it again",
                {"connection": "close"},
            ) from None

    async def _next(self, receive: Receive) -> Message:
        try:
            return await asyncio.wait_for(receive(), self.pause)
        except TimeoutError:
            # This process itself may have stood still: what has come meanwhile is read before the client is blamed.
            return await asyncio.wait_for(receive(), min(_GRACE_SECONDS, self.pause))

    def _in_time(self, receive: Receive) -> Receive:
        """``receive`` that takes a client which pauses for one that has gone."""
        whole = False

        async def limited() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            try:
                message = await self._next(receive)
            except TimeoutError:
                return {"type": "http.disconnect"}
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return limited


class _Gone(Exception):
    """The client left before its request was whole."""


def replay(body: bytes, receive: Receive) -> Receive:
    """Answers the body once, and then what the connection says."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
