"""The endpoints: HTTP in, HTTP out. Every request gets exactly one answer, a refusal with its reason included.

On aiohttp's low-level server: of what its web framework adds nothing is needed here, and it is half of the
time that a request costs.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from asyncep_router.errors import ConfigError, RouterError
from asyncep_router.http.admin import Admin
from asyncep_router.http.admission import Verdict
from asyncep_router.http.errors import Refusal, ShuttingDown, StreamBroken, TooLarge, Unauthorized
from asyncep_router.http.generate import plan_generate
from asyncep_router.http.plans import Plan, plan_completion, plan_opaque
from asyncep_router.http.relay import Context
from asyncep_router.http.request_ids import request_id
from asyncep_router.http.router import Router
from asyncep_router.http.score import plan_score

logger = logging.getLogger("asyncep_router")

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

# Placed by what they ask, forwarded as they are.
_OPAQUE = (
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/classify",
    "/classify",
    "/encode",
    "/v1/rerank",
    "/v1/decisions",
)

# Not passed on to workers: about this connection, or set anew.
_NOT_FORWARDED = frozenset(
    {
        "host",
        "connection",
        "keep-alive",
        "proxy-connection",
        "transfer-encoding",
        "te",
        "trailer",
        "upgrade",
        "expect",
        "content-length",
        "content-type",
        "accept-encoding",
        "accept",
        "user-agent",
    }
)


class App:
    """A handler for `aiohttp.web.Server`. `draining`: new requests are refused."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.draining = False
        self.answering = 0
        """Requests received and not fully answered."""
        self.quiet = asyncio.Event()
        self.quiet.set()
        self._key = router.options.api_key
        self._origins = frozenset(router.options.cors_allowed_origins)
        self._admin = Admin(router)
        self._plans: dict[str, Callable[[bytes], Awaitable[Plan]]] = {
            "/generate": lambda raw: plan_generate(raw, router.tokenizer),
            "/v1/completions": lambda raw: plan_completion(raw, router.tokenizer),
            "/v1/score": lambda raw: plan_score(raw, router.tokenizer, plain=router.plain_scores),
        }
        for path in _OPAQUE:
            self._plans[path] = lambda raw, path=path: _at_once(plan_opaque(path, raw))  # type: ignore[misc]

    def request_factory(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        """For the server: requests that read bodies up to `--max-payload-size`."""
        loop = asyncio.get_running_loop()
        return web.BaseRequest(
            message, payload, protocol, writer, task, loop, client_max_size=self.router.options.max_payload_size
        )

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request."""
        path = request.path
        ident = request_id(request.headers, path, self.router.options.request_id_headers)
        metrics = self.router.metrics
        known = path in self._plans
        name = path if known or (request.method, path) in self._admin.routes else "other"
        metrics.http_requests.labels(request.method, name).inc()
        started = time.perf_counter()
        self.answering += 1
        self.quiet.clear()
        status = 499  # what it stays if the client goes away
        try:
            response = await self._answer(request, path, ident, known)
            status = response.status
            return response
        finally:
            self.answering -= 1
            if not self.answering:
                self.quiet.set()
            metrics.http_responses.labels(str(status)).inc()
            metrics.http_duration.labels(name).observe(time.perf_counter() - started)

    async def _answer(self, request: web.BaseRequest, path: str, ident: str, known: bool) -> web.StreamResponse:
        headers = {"x-request-id": ident}
        if self._origins:
            origin = request.headers.get("Origin", "")
            if origin in self._origins or "*" in self._origins:
                headers["Access-Control-Allow-Origin"] = origin or "*"
                headers["Vary"] = "Origin"
            if request.method == "OPTIONS":
                headers["Access-Control-Allow-Methods"] = "GET, POST, PUT, DELETE, OPTIONS"
                headers["Access-Control-Allow-Headers"] = "*"
                return web.Response(status=204, headers=headers)
        try:
            if known and request.method in ("POST", "PUT"):
                self._authorize(request)
                if self.draining:
                    raise ShuttingDown("the router is shutting down")
                response = await self._infer(request, path, ident, headers)
            else:
                handler, guarded = self._admin.find(request.method, path)
                if guarded:
                    self._authorize(request)
                status, body = await handler(request)
                response = web.Response(status=status, body=body, headers=headers)
                response.content_type = "application/json"
        except Refusal as refusal:
            response = refused(refusal, headers)
            self.router.metrics.router_errors.labels(path if known else "other", refusal.code).inc()
        except web.HTTPRequestEntityTooLarge:
            response = refused(TooLarge(f"--max-payload-size is {self.router.options.max_payload_size}"), headers)
        except ConfigError as error:
            response = _error(400, "invalid_request_error", "bad_request", str(error), headers)
        except RouterError as error:
            logger.exception("request %s", ident)
            response = _error(500, "service_error", "internal_error", str(error), headers)
        except (ConnectionResetError, asyncio.CancelledError):
            raise
        # Whatever else goes wrong is our bug, and still the client gets an answer.
        except Exception as error:
            logger.exception("request %s", ident)
            response = _error(500, "service_error", "internal_error", f"{type(error).__name__}: {error}", headers)
        if self.draining and not response.prepared:
            response.force_close()
        return response

    async def _infer(
        self, request: web.BaseRequest, path: str, ident: str, headers: dict[str, str]
    ) -> web.StreamResponse:
        router = self.router
        # The body first: a client that sends slowly must not hold a place.
        raw = await request.read()
        router.metrics.router_requests.labels(path).inc()
        try:
            async with router.gate.enter() as verdict:
                router.metrics.rate_limit.labels("queued" if verdict is Verdict.QUEUED else "allowed").inc()
                plan = await self._plans[path](raw)
                context = Context(ident, self._forwarded(request, ident))
                if plan.stream:
                    return await self._stream(request, plan, context, headers)
                reply = await router.relay.serve(plan, context)
        except Refusal as refusal:
            if refusal.code == "queue_full":
                router.metrics.rate_limit.labels("rejected").inc()
            raise
        return web.Response(status=reply.status, body=reply.body, headers={**headers, **reply.headers})

    async def _stream(
        self, request: web.BaseRequest, plan: Plan, context: Context, headers: dict[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)

        async def sink(upstream: aiohttp.ClientResponse) -> None:
            response.content_type = upstream.content_type
            response.headers["Cache-Control"] = "no-cache"
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)

        try:
            reply = await self.router.relay.stream(plan, context, sink)
        except StreamBroken:
            # Half an answer must not look whole: without the closing chunk the client sees that it is cut off.
            if request.transport is not None:
                request.transport.abort()
            return response
        if reply is not None:
            return web.Response(status=reply.status, body=reply.body, headers={**headers, **reply.headers})
        await response.write_eof()
        return response

    def _authorize(self, request: web.BaseRequest) -> None:
        if self._key is None:
            return
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._key.encode()):
            raise Unauthorized("the Authorization header must carry the router's API key")

    def _forwarded(self, request: web.BaseRequest, ident: str) -> dict[str, str]:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _NOT_FORWARDED}
        headers["Content-Type"] = "application/json"
        headers["x-request-id"] = ident
        return headers


def refused(refusal: Refusal, headers: dict[str, str]) -> web.Response:
    """A refusal as a response."""
    if refusal.retry_after is not None:
        headers = {**headers, "Retry-After": str(refusal.retry_after)}
    return _error(int(refusal.status), refusal.kind, refusal.code, str(refusal), headers)


def _error(status: int, kind: str, code: str, message: str, headers: dict[str, str]) -> web.Response:
    body = orjson.dumps({"error": {"type": kind, "code": code, "message": message}})
    return web.Response(status=status, body=body, headers={**headers, "Content-Type": "application/json"})


async def _at_once(plan: Plan) -> Plan:
    return plan
