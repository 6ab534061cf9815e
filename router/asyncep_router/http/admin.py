"""Everything that is not inference: liveness, the workers' API, questions passed on to workers, the state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import orjson

from asyncep_router.errors import ConfigError
from asyncep_router.http.errors import BadRequest, NotFound, NoWorker, WorkerUnreachable
from asyncep_router.http.plans import parse

if TYPE_CHECKING:
    from aiohttp import web

    from asyncep_router.http.router import Router
    from asyncep_router.http.worker import Worker

_Answer = tuple[int, bytes]
_Handler = Callable[["web.BaseRequest"], Awaitable[_Answer]]
_SECONDS = 30.0


class Route(NamedTuple):
    """`guarded`: needs the API key."""

    handler: _Handler
    guarded: bool


class Admin:
    """`routes` by (method, path); `find` also knows `/workers/{id}`."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.routes: dict[tuple[str, str], Route] = {
            ("GET", "/liveness"): Route(self._alive, False),
            ("GET", "/health"): Route(self._ready, False),
            ("GET", "/readiness"): Route(self._ready, False),
            ("GET", "/health_generate"): Route(self._health_generate, False),
            ("GET", "/router/state"): Route(self._state, True),
            ("GET", "/get_loads"): Route(self._loads, True),
            ("GET", "/v1/loads"): Route(self._loads, True),
            ("GET", "/workers"): Route(self._list, True),
            ("POST", "/workers"): Route(self._add, True),
            ("POST", "/add_worker"): Route(self._legacy_add, True),
            ("POST", "/remove_worker"): Route(self._legacy_remove, True),
            ("GET", "/list_workers"): Route(self._legacy_list, True),
            ("POST", "/flush_cache"): Route(self._flush, True),
            ("POST", "/abort_request"): Route(self._abort, True),
        }
        for path in ("/v1/models", "/model_info", "/get_model_info", "/server_info", "/get_server_info"):
            self.routes[("GET", path)] = Route(self._ask_one, False)
        for path in ("/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize"):
            self.routes[("POST", path)] = Route(self._ask_one, True)

    def find(self, method: str, path: str) -> Route:
        """Raises `NotFound`."""
        route = self.routes.get((method, path))
        if route is not None:
            return route
        if path.startswith("/workers/"):
            handler = {"GET": self._show, "PUT": self._change, "DELETE": self._remove}.get(method)
            if handler is not None:
                return Route(handler, True)
        raise NotFound(f"no endpoint {method} {path}")

    # Liveness

    async def _alive(self, request: web.BaseRequest) -> _Answer:
        return 200, b'{"status":"ok"}'

    async def _ready(self, request: web.BaseRequest) -> _Answer:
        workers = self._router.fleet.workers.values()
        healthy = sum(worker.accepting for worker in workers)
        status = "ready" if healthy else "not ready"
        body = orjson.dumps({"status": status, "healthy_workers": healthy, "total_workers": len(workers)})
        return 200 if healthy else 503, body

    async def _health_generate(self, request: web.BaseRequest) -> _Answer:
        answers = await self._ask_all("GET", "/health_generate", b"", {})
        healthy = sum(status == 200 for status, _ in answers.values())
        details = {url: status for url, (status, _) in answers.items()}
        return 200 if healthy else 503, orjson.dumps({"healthy_workers": healthy, "workers": details})

    async def _state(self, request: web.BaseRequest) -> _Answer:
        return 200, orjson.dumps(self._router.state())

    async def _loads(self, request: web.BaseRequest) -> _Answer:
        workers = [{"worker": worker.url, "load": worker.active} for worker in self._router.fleet.workers.values()]
        return 200, orjson.dumps({"workers": workers, "pending": self._router.desk.placement.pending})

    # Workers

    async def _list(self, request: web.BaseRequest) -> _Answer:
        workers = [worker.describe() for worker in self._router.fleet.workers.values()]
        stats = {"healthy": sum(worker["is_healthy"] for worker in workers)}
        return 200, orjson.dumps({"workers": workers, "total": len(workers), "stats": stats})

    async def _add(self, request: web.BaseRequest) -> _Answer:
        fields = parse(await request.read())
        url = fields.get("url")
        if not isinstance(url, str):
            raise BadRequest("url: a string is needed")
        worker = self._router.fleet.add(url, fields.get("api_key"), _labels(fields))
        return 202, orjson.dumps({"status": "accepted", "worker_id": worker.id, **worker.describe()})

    async def _show(self, request: web.BaseRequest) -> _Answer:
        return 200, orjson.dumps(self._worker(request).describe())

    async def _change(self, request: web.BaseRequest) -> _Answer:
        worker = self._worker(request)
        fields = parse(await request.read())
        if "labels" in fields:
            worker.labels = _labels(fields)
        if "api_key" in fields:
            worker.api_key = fields["api_key"]
        return 200, orjson.dumps(worker.describe())

    async def _remove(self, request: web.BaseRequest) -> _Answer:
        worker = self._worker(request)
        self._router.fleet.remove(worker)
        return 202, orjson.dumps({"status": "accepted", "worker_id": worker.id, "draining": worker.active})

    async def _legacy_add(self, request: web.BaseRequest) -> _Answer:
        worker = self._router.fleet.add(self._legacy_url(request))
        return 200, orjson.dumps(f"Successfully added worker: {worker.url}")

    async def _legacy_remove(self, request: web.BaseRequest) -> _Answer:
        worker = self._router.fleet.get(self._legacy_url(request))
        self._router.fleet.remove(worker)
        return 200, orjson.dumps(f"Successfully removed worker: {worker.url}")

    async def _legacy_list(self, request: web.BaseRequest) -> _Answer:
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

    async def _ask_one(self, request: web.BaseRequest) -> _Answer:
        """Any worker can answer."""
        worker = self._router.any_worker()
        if worker is None:
            raise NoWorker("no worker is ready")
        return await self._ask(worker, request.method, request.path, await request.read(), _authorization(request))

    async def _flush(self, request: web.BaseRequest) -> _Answer:
        answers = await self._ask_all("POST", "/flush_cache", b"", _authorization(request))
        for worker in self._router.fleet.workers.values():
            if answers.get(worker.url, (0, b""))[0] == 200:
                for rank in worker.ranks:
                    self._router.desk.placement.forget_cache(rank)
        flushed = {url: status for url, (status, _) in answers.items()}
        done = bool(flushed) and all(status == 200 for status in flushed.values())
        return 200 if done else 502, orjson.dumps({"flushed": flushed})

    async def _abort(self, request: web.BaseRequest) -> _Answer:
        answers = await self._ask_all("POST", "/abort_request", await request.read(), _authorization(request))
        return 200, orjson.dumps({"workers": {url: status for url, (status, _) in answers.items()}})

    async def _ask_all(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> dict[str, _Answer]:
        workers = [worker for worker in self._router.fleet.workers.values() if worker.accepting]

        async def ask(worker: Worker) -> _Answer:
            try:
                return await self._ask(worker, method, path, body, headers)
            except WorkerUnreachable as error:
                return 502, str(error).encode()

        answers = await asyncio.gather(*(ask(worker) for worker in workers))
        return {worker.url: answer for worker, answer in zip(workers, answers, strict=True)}

    async def _ask(self, worker: Worker, method: str, path: str, body: bytes, headers: dict[str, str]) -> _Answer:
        if worker.api_key:
            headers = {**headers, "Authorization": f"Bearer {worker.api_key}"}
        if body:
            headers = {**headers, "Content-Type": "application/json"}
        try:
            limit = aiohttp.ClientTimeout(total=_SECONDS)
            async with self._router.session.request(
                method, worker.url + path, data=body or None, headers=headers, timeout=limit
            ) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise WorkerUnreachable(f"worker {worker.url}: {type(error).__name__} {error}") from error


def _labels(fields: dict[str, Any]) -> dict[str, str]:
    labels = fields.get("labels") or {}
    if not isinstance(labels, dict):
        raise ConfigError("labels: an object is needed")
    return {str(key): str(value) for key, value in labels.items()}


def _authorization(request: web.BaseRequest) -> dict[str, str]:
    value = request.headers.get("Authorization")
    return {"Authorization": value} if value else {}
