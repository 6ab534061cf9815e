"""An answer of SGLang's that is changed on its way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send


async def answer_edited(app: ASGIApp, scope: Scope, receive: Receive, send: Send, edit: Callable[[Any], Any]) -> None:
    """Serves a request whose answer is short, with what `edit` makes of its JSON. What is no JSON stays."""
    start: Message | None = None
    body = b""

    async def keep(message: Message) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start":
            start = message
        elif message["type"] == "http.response.body":
            body += message.get("body", b"")

    await app(scope, receive, keep)
    if start is None:
        return
    try:
        shown = orjson.dumps(edit(orjson.loads(body)))
    except orjson.JSONDecodeError:
        shown = body
    headers = [(key, value) for key, value in start["headers"] if key.lower() != b"content-length"]
    await send({**start, "headers": [*headers, (b"content-length", str(len(shown)).encode())]})
    await send({"type": "http.response.body", "body": shown})
