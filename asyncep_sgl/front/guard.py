"""Puts the front's gates around SGLang's HTTP application, in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asyncep_router.keys import Keys
from asyncep_sgl.config.front import FrontSettings
from asyncep_sgl.errors import SeamError
from asyncep_sgl.front.access import AccessGate, Policy, is_local
from asyncep_sgl.front.asgi import error_body
from asyncep_sgl.front.bodies import BodyGate, Held
from asyncep_sgl.front.connections import limit_connections
from asyncep_sgl.front.endpoints import DECODING, INFERENCE, QUESTIONS, shown_in_schema
from asyncep_sgl.front.invalid import answer_invalid
from asyncep_sgl.front.mistakes import MistakesGate
from asyncep_sgl.front.model_cards import ModelCardsGate
from asyncep_sgl.front.passage import caller
from asyncep_sgl.front.secrets import SecretsGate
from asyncep_sgl.front.shapes import ShapeGate

# Bytes of JSON a character may take, and what a conversation has around its texts.
_JSON_BYTES, _AROUND = 4, 1 << 16
_ONE_PROMPT = frozenset(
    {
        "/v1/chat/completions",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/responses",
        "/invocations",
        "/tokenize",
        "/v1/tokenize",
        "/detokenize",
        "/v1/detokenize",
        "/api/chat",
        "/api/generate",
    }
)


def guard(
    app: FastAPI,
    options: FrontSettings,
    policy: Policy,
    *,
    context: int,
    most_tokens: Callable[[], int | None] = lambda: None,
) -> None:
    """Adds the gates to an application, after all other middleware: they stand outermost.

    Args:
        app: SGLang's.
        options: the bounds.
        policy: who may do what.
        context: the model's context length.
        most_tokens: tokens of the longest prompt that ranks take; None until they have said it.

    Raises:
        SeamError: the application has no CORS middleware, so that its way to allow origins is not known.
    """
    kept = [entry for entry in app.user_middleware if entry.cls is not CORSMiddleware]  # type: ignore[comparison-overlap]
    if len(kept) == len(app.user_middleware):
        raise SeamError("seam http_server.app: its CORSMiddleware is gone")
    app.user_middleware[:] = kept
    one_prompt = min(options.max_body_bytes, _JSON_BYTES * options.prompt_chars(context) + _AROUND)
    app.add_middleware(SecretsGate)
    app.add_middleware(ModelCardsGate, most=most_tokens)
    app.add_middleware(MistakesGate, paths=frozenset((*INFERENCE, *DECODING)), questions=frozenset(QUESTIONS))
    app.add_middleware(ShapeGate, paths=frozenset((*INFERENCE, *DECODING)), most_values=options.max_logprobs)
    app.add_middleware(
        BodyGate,
        most=options.max_body_bytes,
        smaller=dict.fromkeys(_ONE_PROMPT, one_prompt),
        pause=options.body_timeout_secs,
        held=Held(options.max_held_bytes),
    )
    app.add_middleware(AccessGate, policy=policy)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    answer_invalid(app)
    app.title, schema = "asyncep serve", app.openapi
    app.openapi = lambda: _served(schema(), policy.decodes)  # type: ignore[method-assign] # FastAPI's way to extend it
    limit_connections(options.max_connections, options.header_timeout_secs, options.body_timeout_secs)


def _served(schema: dict[str, Any], decodes: bool) -> dict[str, Any]:
    """An OpenAPI schema without what is refused."""
    paths = {path: entry for path, entry in schema["paths"].items() if shown_in_schema(path, decodes=decodes)}
    return {**schema, "paths": paths}


def abort_route(keys: Keys, abort: Callable[..., None], owner_of: Callable[[str], str | None]) -> Route:
    """``/abort_request``: everybody may end their own requests, the administrator any.

    Args:
        keys: of the server; without any, the administrator is whoever asks from this machine.
        abort: SGLang's, of ``rid`` and ``abort_all``.
        owner_of: the name of the caller of a request in progress; None if there is none.
    """

    def refused(status: int, message: str) -> Response:
        return Response(error_body(status, message), status, media_type="application/json")

    async def answer(request: Request) -> Response:
        try:
            body: Any = await request.json()
        except ValueError:
            return refused(400, "the body is not JSON")
        if not isinstance(body, dict):
            return refused(400, "the body: an object with rid, or with abort_all, is needed")
        everything, rid = body.get("abort_all", False), body.get("rid")
        who = caller.get()
        master = who.admin or (not keys and is_local(request.scope))
        if everything is True:
            if not master:
                return refused(403, "abort_all: ends other clients' requests; needs the key of --admin-api-key")
            abort(rid="", abort_all=True)
            return JSONResponse({"aborted": True})
        if everything is not False or not isinstance(rid, str) or not rid:
            return refused(400, "rid: the id of a request is needed, or abort_all: true")
        owner = owner_of(rid)
        if owner is None or not (master or owner == who.name):
            return refused(404, "rid: no request of yours with that id is in progress")
        abort(rid=rid)
        return JSONResponse({"aborted": True})

    return Route("/abort_request", answer, methods=["POST"])
