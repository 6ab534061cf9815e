"""The answer to a body that SGLang's models do not take: which fields, and why.

SGLang's own repeats everything that was sent, twice for each thing that is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from asyncep_sgl.errors import SeamError
from asyncep_sgl.front.rules import shown

_SHOWN = 3
# In the schema of its own protocol, and short.
_OTHERS = "/v1/messages"


def answer_invalid(app: FastAPI) -> None:
    """Replaces SGLang's handler.

    Raises:
        SeamError: it has none, so that its answers are not known.
    """
    original: Any = app.exception_handlers.get(RequestValidationError)
    if original is None:
        raise SeamError("seam http_server.app: its handler of RequestValidationError is gone")

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        if request.url.path.startswith(_OTHERS):
            response: Response = await original(request, error)
            return response
        body = {"object": "error", "message": described(error.errors()), "type": "Bad Request", "param": None}
        return JSONResponse({**body, "code": 400}, 400)

    app.exception_handlers[RequestValidationError] = answer


def described(problems: Sequence[Any]) -> str:
    """A line about the first few of pydantic's errors."""
    lines = []
    for problem in problems[:_SHOWN]:
        where = ".".join(str(part)[:80] for part in problem.get("loc", ())[1:]) or "body"
        lines.append(f"{where}: {shown(problem.get('input'))}: {str(problem.get('msg', 'not taken'))[:200]}")
    more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
    return "; ".join(lines) + more
