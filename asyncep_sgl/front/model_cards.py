"""What ``/v1/models`` says of the longest prompt: what is accepted, not the model's context length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from asyncep_sgl.front.edited import answer_edited

_PATH = "/v1/models"
_FIELD = "max_model_len"


def with_length(value: Any, most: int) -> Any:
    """A model's card, or a list of cards, with the length that is accepted."""
    if isinstance(value, list):
        return [with_length(entry, most) for entry in value]
    if not isinstance(value, dict):
        return value
    found = {key: with_length(entry, most) if key == "data" else entry for key, entry in value.items()}
    return {**found, _FIELD: most} if isinstance(found.get(_FIELD), int) else found


@dataclass
class ModelCardsGate:
    """ASGI middleware: puts the accepted length into the answers of ``/v1/models``.

    Attributes:
        most: tokens of the longest prompt that ranks take; None until they have said it.
    """

    app: ASGIApp
    most: Callable[[], int | None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        path = scope.get("path", "").rstrip("/")
        most = self.most() if scope["type"] == "http" and (path == _PATH or path.startswith(f"{_PATH}/")) else None
        if most is None:
            await self.app(scope, receive, send)
        else:
            await answer_edited(self.app, scope, receive, send, lambda value: with_length(value, most))
