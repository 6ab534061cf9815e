"""What ``/server_info`` shows of the configuration: no keys, no command line, no paths of this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from asyncep_sgl.front.edited import answer_edited
from asyncep_sgl.front.passage import caller

_PATHS = ("/server_info", "/get_server_info")
# A word of its own in a name of words joined by underscores. max_total_tokens is no token that opens a door.
_SECRET = re.compile(r"(^|_)(key|keys|secret|secrets|password|passwd|credential|credentials|api_token|hf_token)(_|$)")
_HIDDEN = frozenset({"launch_command"})
# What the routers read: which model and tokenizer this is.
_SHOWN_PATHS = frozenset({"model_path", "tokenizer_path", "served_model_name"})
_MASK = "***"


def redacted(value: Any, *, paths: bool, name: str = "") -> Any:
    """A copy of a JSON value without secrets.

    Args:
        value: as decoded.
        paths: whether absolute paths may be shown.
        name: of the field that holds it.
    """
    if isinstance(value, dict):
        return {
            key: _MASK if _is_secret(str(key), entry) else redacted(entry, paths=paths, name=str(key))
            for key, entry in value.items()
            if key not in _HIDDEN
        }
    if isinstance(value, list):
        return [redacted(entry, paths=paths, name=name) for entry in value]
    if isinstance(value, str) and not paths and name not in _SHOWN_PATHS and value.startswith(("/", "~/", "ipc://")):
        return _MASK
    return value


def _is_secret(name: str, value: Any) -> bool:
    """Whether a field's value is to be hidden; nothing and numbers tell nothing."""
    lowered = name.lower()
    return isinstance(value, str | list | dict) and bool(value) and bool(_SECRET.search(lowered))


@dataclass
class SecretsGate:
    """ASGI middleware: takes secrets out of what SGLang tells about its configuration. The administrator sees paths."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["path"].rstrip("/") not in _PATHS:
            await self.app(scope, receive, send)
            return
        admin = caller.get().admin
        await answer_edited(self.app, scope, receive, send, lambda value: redacted(value, paths=admin))
