"""The Batch API's real routes, store and runner in an application of their own, without SGLang behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncep_router.keys import NOBODY, Caller, Keys
from asyncep_router.rates import Rates
from asyncep_sgl.front.batches.api import BatchApi
from asyncep_sgl.front.batches.bounds import Bounds
from asyncep_sgl.front.passage import caller, in_batch

PATH = "/v1/score"
ENDS = ("completed", "failed", "cancelled", "expired")
Answer = Callable[[dict[str, Any]], Awaitable[tuple[int, Any]]]


async def twice(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"twice": 2 * body["row"]}


def rows(count: int, padding: int = 0, first: int = 0) -> bytes:
    lines = [
        {"custom_id": f"#{i}", "method": "POST", "url": PATH, "body": {"row": i, "padding": "x" * padding}}
        for i in range(first, first + count)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@dataclass
class Api:
    """A client of the application.

    Attributes:
        batches: the API itself.
        seen: who each request that reached the endpoint was served for.
    """

    client: httpx.AsyncClient
    batches: BatchApi
    folder: Path
    seen: list[tuple[str, bool]]

    async def call(self, method: str, path: str, who: str = "", **options: Any) -> httpx.Response:
        return await self.client.request(method, path, headers={"who": who}, **options)

    async def upload(self, data: bytes, who: str = "", **fields: Any) -> httpx.Response:
        form = {"purpose": "batch", **fields}
        return await self.call("POST", "/v1/files", who, data=form, files={"file": ("rows.jsonl", data)})

    async def order(self, data: bytes, who: str = "", **fields: Any) -> dict[str, Any]:
        file = await self.upload(data, who)
        assert file.status_code == 200, file.text
        order = {"input_file_id": file.json()["id"], "endpoint": PATH, "completion_window": "24h", **fields}
        answer = await self.call("POST", "/v1/batches", who, json=order)
        assert answer.status_code == 200, answer.text
        batch: dict[str, Any] = answer.json()
        return batch

    async def until(
        self, batch_id: str, who: str = "", found: Callable[[dict[str, Any]], bool] = lambda b: b["status"] in ENDS
    ) -> dict[str, Any]:
        async with asyncio.timeout(60):
            while not found(batch := (await self.call("GET", f"/v1/batches/{batch_id}", who)).json()):
                # The API has no other way to learn of it than asking.
                await asyncio.sleep(0.02)
        shown: dict[str, Any] = batch
        return shown

    async def lines(self, file_id: str | None, who: str = "") -> list[dict[str, Any]]:
        if file_id is None:
            return []
        answer = await self.call("GET", f"/v1/files/{file_id}/content", who)
        assert answer.status_code == 200, answer.text
        return [json.loads(line) for line in answer.text.splitlines()]


@contextlib.asynccontextmanager
async def api(
    folder: Path,
    *,
    answer: Answer = twice,
    bounds: Bounds | None = None,
    callers: dict[str, Caller] | None = None,
    keys: Keys | None = None,
    rates: Rates | None = None,
    most: int = 8,
) -> AsyncIterator[Api]:
    """The application on a folder; the header ``who`` says who calls."""
    seen: list[tuple[str, bool]] = []

    async def endpoint(request: Request) -> Response:
        seen.append((caller.get().name, in_batch.get()))
        status, body = await answer(await request.json())
        return Response(json.dumps(body), status, media_type="application/json")

    app = Starlette(routes=[Route(PATH, endpoint, methods=["POST"])])
    batches = BatchApi(app, folder, "model", most=most, bounds=bounds, keys=keys, rates=rates)
    app.routes.extend(batches.routes())

    class Who:
        """Sets the caller of requests from outside, as the front's middleware does."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if not in_batch.get():
                name = dict(scope["headers"]).get(b"who", b"").decode()
                caller.set((callers or {}).get(name, Caller(name) if name else NOBODY))
            await self._inner(scope, receive, send)

    app.add_middleware(Who)
    batches.alive(asyncio.get_running_loop())
    batches.begin()
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            yield Api(client, batches, folder, seen)
    finally:
        await batches.close()


Test = Callable[[Api], Awaitable[None]]


def on(folder: Path, test: Test, **options: Any) -> None:
    """Runs a test on an application of its own; options as for `api`."""

    async def run() -> None:
        async with api(folder, **options) as client:
            await test(client)

    asyncio.run(run())
