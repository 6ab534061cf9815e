"""Everything that is not inference: liveness, the workers' API, questions passed on to workers, the state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from asyncep_router.errors import ConfigError
from asyncep_router.http.errors import BadRequest, NoWorker, WorkerUnreachable
from asyncep_router.http.openapi import document
from asyncep_router.http.plans import parse
from asyncep_router.http.probe import read_answer
from asyncep_router.http.public import public
from asyncep_router.http.routes import ROUTES, Route
from asyncep_router.http.worker_urls import worker_key

if TYPE_CHECKING:
    from aiohttp import web

    from asyncep_router.http.connections import Bodies
    from asyncep_router.http.router import Router
    from asyncep_router.http.worker import Worker
    from asyncep_router.keys import Caller, Keys

_Answer = tuple[int, bytes]
_Handler = Callable[["web.BaseRequest", "Caller"], Awaitable[_Answer]]
# A question that several workers can answer: each may take so long, and so many are asked.
_SECONDS = 10.0
_ASKED = 3
_HEALTH_SECONDS = 30.0
_LONGEST_ANSWER = 64 * 2**20
_CONTROL = ("/flush_cache", "/abort_request")
_LABELS, _LONGEST_LABEL = 64, 256


class Admin:
    """Answers the routes that have a handler. `bodies` reads requests; `keys` must not stand in answers."""

    def __init__(self, router: Router, bodies: Bodies, keys: Keys) -> None:
        self._router = router
        self._bodies = bodies
        self._keys = keys
        self._openapi = orjson.dumps(document(bool(keys)))
        self._handlers: dict[str, _Handler] = {
            route.handler: getattr(self, f"_{route.handler}") for route in ROUTES if route.handler
        }

    async def answer(self, route: Route, request: web.BaseRequest, caller: Caller) -> _Answer:
        """Status and body. Raises `Refusal`, `ConfigError`."""
        return await self._handlers[route.handler](request, caller)

    def _told(self, state: dict[str, Any]) -> bytes:
        """What the router says of itself, without any key."""
        return orjson.dumps(public(state, self._secrets(), paths=True))

    async def _body(self, request: web.BaseRequest) -> bytes:
        async with self._bodies.read(request) as raw:
            return raw

    def _secrets(self) -> list[str]:
        """Every key the router knows."""
        workers = self._router.fleet.workers.values()
        known = (key for worker in workers for key in (worker.api_key, worker.admin_key) if key)
        return [*self._keys.holders, *known]

    # Liveness

    async def _alive(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        return 200, b'{"status":"ok"}'

    async def _ready(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        workers = self._router.fleet.workers.values()
        healthy = sum(worker.accepting for worker in workers)
        status = "ready" if healthy else "not ready"
        body = orjson.dumps({"status": status, "healthy_workers": healthy, "total_workers": len(workers)})
        return 200 if healthy else 503, body

    async def _document(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        return 200, self._openapi

    async def _health_generate(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        answers = await self._ask_all("GET", "/health_generate", b"")
        healthy = sum(status == 200 for status, _ in answers.values())
        details = {url: status for url, (status, _) in answers.items()}
        return 200 if healthy else 503, orjson.dumps({"healthy_workers": healthy, "workers": details})

    async def _state(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        return 200, self._told(self._router.state())

    async def _loads(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        workers = [{"worker": worker.url, "load": worker.active} for worker in self._router.fleet.workers.values()]
        return 200, orjson.dumps({"workers": workers, "pending": self._router.desk.policy.pending})

    # Workers

    async def _list(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        workers = [worker.describe() for worker in self._router.fleet.workers.values()]
        stats = {"healthy": sum(worker["is_healthy"] for worker in workers)}
        return 200, self._told({"workers": workers, "total": len(workers), "stats": stats})

    async def _add(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        fields = parse(await self._body(request))
        url = fields.get("url")
        if not isinstance(url, str):
            raise BadRequest("url: a string is needed")
        worker = self._router.fleet.add(url, fields.get("api_key"), _labels(fields))
        return 202, self._told({"status": "accepted", "worker_id": worker.id, **worker.describe()})

    async def _show(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        return 200, self._told(self._worker(request).describe())

    async def _change(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        worker = self._worker(request)
        fields = parse(await self._body(request))
        labels = _labels(fields) if "labels" in fields else worker.labels
        if "api_key" in fields:
            worker.api_key = worker_key(fields["api_key"])
        worker.labels = labels
        return 200, self._told(worker.describe())

    async def _remove(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        worker = self._worker(request)
        self._router.fleet.remove(worker)
        return 202, orjson.dumps({"status": "accepted", "worker_id": worker.id, "draining": worker.active})

    async def _legacy_add(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        worker = self._router.fleet.add(self._legacy_url(request))
        return 200, orjson.dumps(f"Successfully added worker: {worker.url}")

    async def _legacy_remove(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        worker = self._router.fleet.get(self._legacy_url(request))
        self._router.fleet.remove(worker)
        return 200, orjson.dumps(f"Successfully removed worker: {worker.url}")

    async def _legacy_list(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        return 200, orjson.dumps({"urls": [worker.url for worker in self._router.fleet.workers.values()]})

    def _worker(self, request: web.BaseRequest) -> Worker:
        return self._router.fleet.get(request.path.removeprefix("/workers/"))

    @staticmethod
    def _legacy_url(request: web.BaseRequest) -> str:
        url = request.query.get("url")
        if not url:
            raise BadRequest("the query parameter url is missing")
        return url

    # Passed on

    async def _ask_one(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        """Any worker can answer; one that does not is left for another."""
        body = await self._body(request) if request.method == "POST" else b""
        failure: WorkerUnreachable | None = None
        for worker in self._router.accepting()[:_ASKED]:
            try:
                status, answer = await self._ask(worker, request.method, request.path, body, _SECONDS)
            except WorkerUnreachable as error:
                failure = error
                continue
            return status, self._shown(answer, caller) if request.method == "GET" else answer
        raise failure or NoWorker("no worker is ready")

    def _shown(self, answer: bytes, caller: Caller) -> bytes:
        """What a worker says of itself, as this caller may see it."""
        try:
            found = orjson.loads(answer)
        except orjson.JSONDecodeError:
            found = {"error": {"type": "service_error", "code": "unreadable", "message": "the worker answered no JSON"}}
        return orjson.dumps(public(found, self._secrets(), paths=caller.admin))

    async def _flush(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        answers = await self._ask_all("POST", "/flush_cache", b"")
        for worker in self._router.fleet.workers.values():
            if answers.get(worker.url, (0, b""))[0] == 200:
                for rank in worker.ranks:
                    self._router.desk.policy.cache_cleared(rank)
        flushed = {url: status for url, (status, _) in answers.items()}
        done = bool(flushed) and all(status == 200 for status in flushed.values())
        return 200 if done else 502, orjson.dumps({"flushed": flushed})

    async def _abort(self, request: web.BaseRequest, caller: Caller) -> _Answer:
        body = await self._body(request)
        parse(body)
        answers = await self._ask_all("POST", "/abort_request", body)
        return 200, orjson.dumps({"workers": {url: status for url, (status, _) in answers.items()}})

    async def _ask_all(self, method: str, path: str, body: bytes) -> dict[str, _Answer]:
        workers = self._router.accepting()

        async def ask(worker: Worker) -> _Answer:
            try:
                return await self._ask(worker, method, path, body, _HEALTH_SECONDS)
            except WorkerUnreachable as error:
                return 502, str(error).encode()

        answers = await asyncio.gather(*(ask(worker) for worker in workers))
        return {worker.url: answer for worker, answer in zip(workers, answers, strict=True)}

    async def _ask(self, worker: Worker, method: str, path: str, body: bytes, seconds: float) -> _Answer:
        headers = worker.headers(admin=path in _CONTROL)
        if body:
            headers = {**headers, "Content-Type": "application/json"}
        try:
            limit = aiohttp.ClientTimeout(total=seconds)
            async with self._router.session.request(
                method, worker.url + path, data=body or None, headers=headers, timeout=limit, allow_redirects=False
            ) as response:
                return response.status, await read_answer(response, _LONGEST_ANSWER)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise WorkerUnreachable(f"worker {worker.url}: {type(error).__name__} {error}") from error


def _labels(fields: dict[str, Any]) -> dict[str, str]:
    labels = fields.get("labels") or {}
    if not isinstance(labels, dict):
        raise ConfigError("labels: an object is needed")
    if len(labels) > _LABELS or any(len(str(part)) > _LONGEST_LABEL for pair in labels.items() for part in pair):
        raise ConfigError(f"labels: at most {_LABELS}, each name and value of at most {_LONGEST_LABEL} characters")
    return {str(key): str(value) for key, value in labels.items()}
