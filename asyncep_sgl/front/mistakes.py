"""Errors of a request that SGLang takes for its own: until something has gone to a rank, a 500 is the client's 400.

SGLang parses and prepares requests in code that raises whatever it meets: a string where an object was meant is an
AttributeError, options nested too deep a RecursionError. Nothing is wrong with the server then. Its errors also name
source files; they are taken out, and messages are kept short.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncep_sgl.front.asgi import Refusal, refuse
from asyncep_sgl.front.passage import Passage, passage

logger = logging.getLogger("asyncep")

# What FastAPI adds to a validation error, and a path of at least three parts anywhere.
_SOURCE = re.compile(r'File "[^"]*", line \d+, in [^\n]*(\n[^\n]*)?')
_PATH = re.compile(r"(?:/[\w.+@-]+){3,}")
_LONGEST = 2000
# What is read of an error at most: patterns cost more than its length.
_READ = 4 * _LONGEST
# SGLang reports a failure of its own preparing code so.
_PREFIXES = ("Internal server error: ", "Internal server error during tokenization: ")


@dataclass
class MistakesGate:
    """ASGI middleware: answers 400 instead of 500 for a request that failed before anything of it reached a rank.

    Attributes:
        paths: of the endpoints that read prompts.
        questions: of endpoints of SGLang that read parameters from the URL. Without any, an error is the server's.
    """

    app: ASGIApp
    paths: Collection[str]
    questions: Collection[str] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if not self._reads(scope):
            await self.app(scope, receive, send)
            return
        this = Passage()
        token = passage.set(this)
        reply = _Reply(this, send)
        try:
            await self.app(scope, receive, reply.send)
        except Refusal as refusal:
            if reply.started:
                raise
            await refuse(send, refusal)
        except Exception as error:
            if reply.started or this.sent:
                raise
            logger.info("a request to %s could not be read: %r", scope["path"], error)
            await refuse(send, Refusal(400, without_sources(f"the request cannot be read: {_described(error)}")))
        finally:
            passage.reset(token)

    def _reads(self, scope: Scope) -> bool:
        if scope["type"] != "http":
            return False
        path = scope["path"].rstrip("/")
        return path in self.paths or (path in self.questions and bool(scope["query_string"]))


class _Reply:
    """Holds an error back until its body is known."""

    def __init__(self, this: Passage, send: Send) -> None:
        self._this, self._send = this, send
        self._held: Message | None = None
        self._body = b""
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                self._held = message
                return
            self.started = True
        elif self._held is not None and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                self.started = True
                await self._send_error(self._held)
            return
        await self._send(message)

    async def _send_error(self, start: Message) -> None:
        try:
            found: Any = orjson.loads(self._body)
        except orjson.JSONDecodeError:
            found = None
        if start["status"] == 500 and not self._this.sent:
            await refuse(self._send, Refusal(400, without_sources(f"the request cannot be read: {_message_of(found)}")))
            return
        body = self._body if found is None else orjson.dumps(_cleaned(found))
        headers = [(key, value) for key, value in start["headers"] if key.lower() != b"content-length"]
        await self._send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})


def without_sources(text: str) -> str:
    """A message without source files and paths of this machine, and not longer than somebody reads."""
    text = _PATH.sub("…", _SOURCE.sub("", text[:_READ])).strip()
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_cleaned(entry) for entry in value]
    return without_sources(value) if isinstance(value, str) else value


def _message_of(found: Any) -> str:
    """The message of an error that SGLang wrote."""
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    text = str(found) if found else "something in it is not what SGLang expects"
    for prefix in _PREFIXES:
        text = text.removeprefix(prefix)
    return text


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
