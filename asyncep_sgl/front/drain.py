"""An ordered stop of the front: new requests get 503, those in flight finish, then the process ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from asyncep_sgl.process.stop_signals import DRAIN_SIGNAL

_REFUSAL = b'{"error":{"message":"the server is stopping; send the request again to another","code":503}}'


class Drain:
    """ASGI middleware that counts requests in flight and ends the process when a drain finds none left.

    SGLang's own drain looks every five seconds and takes new requests meanwhile.
    """

    def __init__(self, app: ASGIApp, finish: Callable[[], None] = lambda: os._exit(0)) -> None:
        self._app = app
        self._finish = finish
        self._in_flight = 0
        self._draining = False
        signal.signal(DRAIN_SIGNAL, lambda *_: self.begin())

    def begin(self) -> None:
        """Takes no new request from now on."""
        self._draining = True
        self._finish_if_empty()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or refuses it while draining."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._draining:
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})
            return
        self._in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight -= 1
            self._finish_if_empty()

    def _finish_if_empty(self) -> None:
        if self._draining and not self._in_flight:
            self._finish()
