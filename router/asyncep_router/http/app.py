"""The endpoints: HTTP in, HTTP out. Every request gets exactly one answer, a refusal with its reason included.

On aiohttp's low-level server: of what its web framework adds nothing is needed here, and it is half of the
time that a request costs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from asyncep_router.errors import ConfigError, RouterError
from asyncep_router.http.access import Access
from asyncep_router.http.admin import Admin
from asyncep_router.http.admission import Verdict
from asyncep_router.http.bounds import check_prompts
from asyncep_router.http.connections import Bodies, LimitedServer, in_time
from asyncep_router.http.errors import (
    ClientGone,
    Forbidden,
    NotFound,
    RateLimited,
    Refusal,
    ShuttingDown,
    StreamBroken,
    WrongMethod,
)
from asyncep_router.http.generate import plan_generate
from asyncep_router.http.plans import Forward, Plan, bytes_prompt, parse, plan_completion, plan_opaque
from asyncep_router.http.relay import Context
from asyncep_router.http.request_ids import request_id
from asyncep_router.http.routes import INFERENCE, Route, find
from asyncep_router.http.score import plan_score
from asyncep_router.rates import Rates

if TYPE_CHECKING:
    import aiohttp

    from asyncep_router.http.router import Router
    from asyncep_router.keys import Caller

logger = logging.getLogger("asyncep_router")

Fields = dict[str, Any]

# Passed on to workers beside what the router sets itself. Nothing that could be a key, and nothing that speaks of the
# client's connection.
_FORWARDED = frozenset({"traceparent", "tracestate", "baggage", "accept-language", "x-smg-routing-key"})
_UNBOUND = ("x-sglext-",)


class App:
    """A handler for `aiohttp.web.Server`. `draining`: new requests are refused."""

    def __init__(self, router: Router) -> None:
        options = router.options
        self.router = router
        self.draining = False
        self.answering = 0
        """Requests received and not fully answered."""
        self.quiet = asyncio.Event()
        self.quiet.set()
        keys = options.keys
        self._access = Access(keys)
        self._rates = Rates(router.desk.now)
        self._origins = frozenset(options.cors_allowed_origins)
        self._bodies = Bodies(options.max_payload_size, options.max_held_bytes, options.body_timeout_secs)
        self._admin = Admin(router, self._bodies, keys)
        self._plans: dict[str, Callable[[bytes, Fields], Awaitable[Plan]]] = {
            "/generate": lambda raw, fields: plan_generate(raw, fields, router.tokenizer),
            "/v1/completions": lambda raw, fields: plan_completion(raw, fields, router.tokenizer),
            "/v1/score": lambda raw, fields: plan_score(raw, fields, router.tokenizer, plain=router.plain_scores),
        }
        for path, _ in INFERENCE:
            self._plans.setdefault(path, lambda raw, fields, path=path: _at_once(plan_opaque(path, raw, fields)))  # type: ignore[misc]

    def server(self) -> LimitedServer:
        """The server that lets clients in."""
        options = self.router.options
        return LimitedServer(
            self,
            most=options.max_connections,
            header_seconds=options.header_timeout_secs,
            keep_alive=options.keep_alive_timeout_secs,
            taking_seconds=options.body_timeout_secs,
            handler_cancellation=True,
        )

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request."""
        path = request.path
        ident = request_id(request.headers, path, self.router.options.request_id_headers)
        metrics = self.router.metrics
        route = find(request.method, path)
        name = route.path if isinstance(route, Route) else "other"
        metrics.http_requests.labels(request.method if isinstance(route, Route) else "other", name).inc()
        started = time.perf_counter()
        self.answering += 1
        self.quiet.clear()
        status = 499  # what it stays if the client goes away
        try:
            response = await self._answer(request, path, ident, route)
            if not response.prepared:
                await in_time(request, _send(request, response), self.router.options.body_timeout_secs)
            status = response.status
            return response
        except ClientGone as error:
            raise ConnectionResetError(str(error)) from error
        finally:
            self.answering -= 1
            if not self.answering:
                self.quiet.set()
            metrics.http_responses.labels(str(status)).inc()
            metrics.http_duration.labels(name).observe(time.perf_counter() - started)

    async def _answer(
        self, request: web.BaseRequest, path: str, ident: str, route: Route | tuple[str, ...]
    ) -> web.StreamResponse:
        headers = {"x-request-id": ident, **self._cross_origin(request)}
        if request.method == "OPTIONS" and self._origins:
            headers["Access-Control-Allow-Methods"] = "GET, POST, PUT, DELETE, OPTIONS"
            headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, X-Request-Id"
            return web.Response(status=204, headers=headers)
        name = route.path if isinstance(route, Route) else "other"
        try:
            if not isinstance(route, Route):
                if route:
                    raise WrongMethod(f"{path[:200]}: only {', '.join(route)}", route)
                raise NotFound(f"no endpoint {request.method} {path[:200]}; /openapi.json lists those there are")
            caller = self._access.check(route.right, request.headers, request.remote)
            if route.infers:
                if self.draining:
                    raise ShuttingDown("the router is shutting down")
                response = await self._infer(request, route, ident, headers, caller)
            else:
                status, body = await self._admin.answer(route, request, caller)
                response = web.Response(status=status, body=body, headers=headers)
                response.content_type = "application/json"
        except Refusal as refusal:
            response = refused(refusal, headers)
            self.router.metrics.router_errors.labels(name, refusal.code).inc()
        except ConfigError as error:
            response = _error(400, "invalid_request_error", "bad_request", str(error), headers)
        except RouterError as error:
            if isinstance(error, ClientGone):
                raise
            logger.exception("request %s", ident)
            response = _error(500, "service_error", "internal_error", str(error), headers)
        except (ConnectionResetError, asyncio.CancelledError):
            raise
        # Whatever else goes wrong is our bug, and still the client gets an answer.
        except Exception as error:
            logger.exception("request %s", ident)
            response = _error(500, "service_error", "internal_error", f"{type(error).__name__}: {error}", headers)
        # A client that waits to be told to send its body must not take what it sends next for a new request.
        if not response.prepared and (self.draining or ("Expect" in request.headers and response.status >= 400)):
            response.force_close()
        return response

    def _cross_origin(self, request: web.BaseRequest) -> dict[str, str]:
        """Headers for a browser. An origin is named only where it was configured, and cookies never count."""
        if "*" in self._origins:
            return {"Access-Control-Allow-Origin": "*"}
        origin = request.headers.get("Origin", "")
        if origin and origin in self._origins:
            return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        return {"Vary": "Origin"} if self._origins else {}

    async def _infer(
        self, request: web.BaseRequest, route: Route, ident: str, headers: dict[str, str], caller: Caller
    ) -> web.StreamResponse:
        router, path = self.router, route.path
        # The body first: a client that sends slowly must not hold a place.
        async with self._bodies.read(request) as raw:
            router.metrics.router_requests.labels(path).inc()
            fields = parse(raw)
            prompts = check_prompts(path, fields, router.options.max_prompts)
            self._check_priority(request, fields)
            wait = self._rates.take(caller, prompts)
            if wait > 0:
                raise RateLimited(f"the key {caller.name!r} has used up its prompts a second", wait)
            try:
                async with router.gate.enter() as verdict:
                    router.metrics.rate_limit.labels("queued" if verdict is Verdict.QUEUED else "allowed").inc()
                    plan = await self._plan(path, raw, fields, ident)
                    del fields
                    context = Context(ident, _forwarded(request, ident), caller.name or request.remote or "")
                    if plan.stream:
                        return await self._stream(request, plan, context, headers)
                    reply = await router.relay.serve(plan, context)
            except Refusal as refusal:
                if refusal.code == "queue_full":
                    router.metrics.rate_limit.labels("rejected").inc()
                raise
            return web.Response(status=reply.status, body=reply.body, headers={**headers, **reply.headers})

    async def _plan(self, path: str, raw: bytes, fields: Fields, ident: str) -> Plan:
        try:
            return await self._plans[path](raw, fields)
        except Refusal:
            raise
        # A body that the router fails to understand is a worker's to judge: it goes there as it came.
        except Exception:
            logger.exception("request %s to %s goes to a worker as it is: it could not be planned", ident, path)
            return Forward(path, raw, bytes_prompt(raw), {}, pinnable=False)

    def _check_priority(self, request: web.BaseRequest, fields: Fields) -> None:
        priority = fields.get("priority")
        above = isinstance(priority, int) and priority > 0
        if above and not self._access.administrates(request.headers, request.remote):
            raise Forbidden("priority: above 0 is the administrator's (--admin-api-key); 0 is normal")

    async def _stream(
        self, request: web.BaseRequest, plan: Plan, context: Context, headers: dict[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        patience = self.router.options.body_timeout_secs

        async def sink(upstream: aiohttp.ClientResponse) -> None:
            response.content_type = upstream.content_type
            response.headers["Cache-Control"] = "no-cache"
            await in_time(request, response.prepare(request), patience)
            async for chunk in upstream.content.iter_any():
                await in_time(request, response.write(chunk), patience)

        try:
            reply = await self.router.relay.stream(plan, context, sink)
        except StreamBroken:
            # Half an answer must not look whole: without the closing chunk the client sees that it is cut off.
            if request.transport is not None:
                request.transport.abort()
            return response
        if reply is not None:
            return web.Response(status=reply.status, body=reply.body, headers={**headers, **reply.headers})
        await in_time(request, response.write_eof(), patience)
        return response


def _forwarded(request: web.BaseRequest, ident: str) -> dict[str, str]:
    """The headers that go to a worker."""
    headers = {
        name: value
        for name, value in request.headers.items()
        if (name.lower() in _FORWARDED or name.lower().startswith(_UNBOUND)) and value.isascii()
    }
    headers["Content-Type"] = "application/json"
    headers["x-request-id"] = ident
    return headers


async def _send(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Return once the client has taken nearly all of it: until then it counts as being answered."""
    await response.prepare(request)
    await response.write_eof()
    await request.writer.drain()


def refused(refusal: Refusal, headers: dict[str, str]) -> web.Response:
    """A refusal as a response."""
    if refusal.retry_after is not None:
        headers = {**headers, "Retry-After": str(refusal.retry_after)}
    if refusal.status == 401:
        headers = {**headers, "WWW-Authenticate": "Bearer"}
    if isinstance(refusal, WrongMethod):
        headers = {**headers, "Allow": ", ".join(refusal.allowed)}
    return _error(int(refusal.status), refusal.kind, refusal.code, str(refusal), headers)


def _error(status: int, kind: str, code: str, message: str, headers: dict[str, str]) -> web.Response:
    # A path may hold bytes that are no text.
    message = message.encode(errors="replace").decode()
    body = orjson.dumps({"error": {"type": kind, "code": code, "message": message}})
    return web.Response(status=status, body=body, headers={**headers, "Content-Type": "application/json"})


async def _at_once(plan: Plan) -> Plan:
    return plan
