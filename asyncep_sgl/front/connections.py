"""Connections to the front: how many there may be, and how long each may take to ask and to take its answer."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

from uvicorn import config as uvicorn_config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_GRACE_SECONDS = 1.0


def limited(most: int, header_seconds: float, answer_seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with three bounds that it has not.

    Args:
        most: connections at a time. A further one is answered 503 and closed.
        header_seconds: from the first byte of a connection, or of a request on it, until its headers are whole. Then it
            is answered 408 and closed.
        answer_seconds: in which a client takes nothing of an answer; then it is cut off.
    """
    base: Any = AutoHTTPProtocol

    class LimitedProtocol(base):  # type: ignore[misc] # uvicorn chooses the class when it is imported
        _due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # What was written is waited for when a connection closes, too: only the kernel sees that nobody reads.
            connection = transport.get_extra_info("socket")
            if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(answer_seconds * 1000))
            if len(self.connections) > most:
                self._close(_FULL)
                return
            self._due = self.loop.call_later(header_seconds, self._expire)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel()
            elif self._due is None and not self.transport.is_closing():
                self._due = self.loop.call_later(header_seconds, self._expire)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def _cancel(self) -> None:
            if self._due is not None:
                self._due.cancel()
                self._due = None

        def _expire(self, due: float | None = None) -> None:
            now, grace = time.monotonic(), min(_GRACE_SECONDS, header_seconds)
            if due is not None and now < due + grace / 2:
                self._close(_SLOW)
                return
            # This process itself may have stood still, and stands still again where the grace ends late: what has come
            # meanwhile is read before the client is blamed.
            self._due = self.loop.call_later(grace, self._expire, now + grace)

        def _close(self, answer: bytes) -> None:
            self._cancel()
            if not self.transport.is_closing():
                self.transport.write(answer)
                self.transport.close()

    return LimitedProtocol


def limit_connections(most: int, header_seconds: float, answer_seconds: float) -> None:
    """Gives uvicorn's servers of this process the bounds of `limited`. To be called before one is configured."""
    protocols: dict[str, Any] = uvicorn_config.HTTP_PROTOCOLS
    protocols["auto"] = limited(most, header_seconds, answer_seconds)
