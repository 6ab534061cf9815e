"""Headers of requests, and answers in the error schema of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.types import Scope, Send

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer other than the one asked for.

    Attributes:
        status: HTTP status.
        message: what is wrong and what to do.
        headers: to be sent with it.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that name (lower case), or None."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None


def error_body(status: int, message: str) -> bytes:
    """An error in OpenAI's schema."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}})


async def answer(send: Send, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    """Sends a whole JSON answer."""
    lines = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def refuse(send: Send, refusal: Refusal) -> None:
    """Sends a refusal."""
    await answer(send, refusal.status, error_body(refusal.status, refusal.message), refusal.headers)
