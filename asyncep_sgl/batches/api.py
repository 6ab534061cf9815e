"""The routes of the Batch API, and its life inside SGLang's server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from asyncep_sgl.batches.records import MOST_FILE_BYTES, ApiError, expiry_seconds, read_order
from asyncep_sgl.batches.runner import BatchRunner
from asyncep_sgl.batches.store import BatchStore, open_store
from asyncep_sgl.drain import App, Receive, Scope, Send
from asyncep_sgl.errors import UsageError

logger = logging.getLogger("asyncep")

# What a form has around the file.
_FORM_BYTES = 1 << 20


class BatchApi:
    """Files and batches of one server. Its folder is made when the first file comes.

    Args:
        app: the server's whole application; a batch's requests are sent through it.
        folder: where the state is kept.
        model: what the server serves.
        api_key: what the server asks of its clients.
        most: requests of batches under way at a time.
    """

    def __init__(self, app: Starlette, folder: Path, model: str, api_key: str | None, most: int) -> None:
        self._folder, self._model, self._most = folder, model, most
        self._opened: tuple[BatchStore, BatchRunner] | None = None
        self._opening = asyncio.Lock()
        self._stack = contextlib.AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),
            base_url="http://batch",
            timeout=None,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
        )

    def routes(self) -> list[Route]:
        """What clients call."""
        table: tuple[tuple[str, str, Callable[[Request], Awaitable[Response]]], ...] = (
            ("POST", "/v1/files", self._upload),
            ("GET", "/v1/files", self._list_files),
            ("GET", "/v1/files/{id}", self._get_file),
            ("DELETE", "/v1/files/{id}", self._delete_file),
            ("GET", "/v1/files/{id}/content", self._content),
            ("POST", "/v1/batches", self._create),
            ("GET", "/v1/batches", self._list_batches),
            ("GET", "/v1/batches/{id}", self._get_batch),
            ("POST", "/v1/batches/{id}/cancel", self._cancel),
        )
        return [Route(path, _answering(handler), methods=[method]) for method, path, handler in table]

    # Life

    def begin(self) -> None:
        """The server serves: goes on with what an earlier one left. From any thread."""
        if self._loop is not None and (self._folder / "state.sqlite").exists():
            asyncio.run_coroutine_threadsafe(self._resume(), self._loop)

    async def _resume(self) -> None:
        try:
            await self._open()
        except ApiError as error:
            logger.error("batches are not gone on with: %s", error.message)

    def alive(self, loop: asyncio.AbstractEventLoop) -> None:
        """The server's event loop has started."""
        self._loop = loop

    async def close(self) -> None:
        """Stops; what is unfinished is kept."""
        await self._stack.aclose()
        await self._client.aclose()

    async def _open(self) -> tuple[BatchStore, BatchRunner]:
        async with self._opening:
            if self._opened is None:
                try:
                    store = await self._stack.enter_async_context(open_store(self._folder))
                except UsageError as error:
                    raise ApiError(503, str(error)) from error
                runner = BatchRunner(store, self._model, self._send, most=self._most)
                self._stack.push_async_callback(runner.close)
                await runner.resume()
                self._opened = store, runner
            return self._opened

    async def _send(self, path: str, body: bytes) -> tuple[int, bytes]:
        answer = await self._client.post(path, content=body, headers={"content-type": "application/json"})
        if answer.headers.get("content-type", "").startswith("application/json"):
            return answer.status_code, answer.content
        return answer.status_code, orjson.dumps({"error": {"message": answer.text, "code": answer.status_code}})

    # Files

    async def _upload(self, request: Request) -> Response:
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MOST_FILE_BYTES + _FORM_BYTES:
            raise _too_large()
        try:
            async with request.form(max_files=1, max_fields=8) as form:
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, UploadFile):
                    raise ApiError(400, "file: a file is needed, sent as multipart/form-data", param="file")
                if purpose != "batch":
                    raise ApiError(400, f"purpose: {purpose!r}: only 'batch' is served here", param="purpose")
                if (file.size or 0) > MOST_FILE_BYTES:
                    raise _too_large()
                prefix = "expires_after["
                expiry = {key[len(prefix) : -1]: value for key, value in form.items() if key.startswith(prefix)}
                seconds = expiry_seconds(expiry or None, "expires_after")
                store, _ = await self._open()
                record = await store.files.add("batch", file.filename or "batch.jsonl", file.file, seconds)
        except HTTPException as error:
            raise ApiError(400, f"the form cannot be read: {error.detail}") from error
        return JSONResponse(record.as_json())

    async def _list_files(self, request: Request) -> Response:
        limit, after = _number(request, "limit", 10_000, 10_000), request.query_params.get("after")
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise ApiError(400, f"order: {order!r}: use asc or desc", param="order")
        store, _ = await self._open()
        purpose = request.query_params.get("purpose")
        files = await store.files.page(purpose=purpose, after=after, limit=limit + 1, newest=order == "desc")
        return _listed([file.as_json() for file in files], limit)

    async def _get_file(self, request: Request) -> Response:
        store, _ = await self._open()
        return JSONResponse((await store.files.get(request.path_params["id"])).as_json())

    async def _delete_file(self, request: Request) -> Response:
        store, _ = await self._open()
        await store.files.delete(request.path_params["id"])
        return JSONResponse({"id": request.path_params["id"], "object": "file", "deleted": True})

    async def _content(self, request: Request) -> Response:
        store, _ = await self._open()
        file = await store.files.get(request.path_params["id"])
        return FileResponse(store.files.path(file.id), media_type="application/jsonl", filename=file.filename)

    # Batches

    async def _create(self, request: Request) -> Response:
        try:
            body = orjson.loads(await request.body())
        except orjson.JSONDecodeError as error:
            raise ApiError(400, f"the body is not JSON: {error}") from error
        order = read_order(body)
        store, runner = await self._open()
        batch = await store.add_batch(order, self._model)
        runner.begin(batch)
        return JSONResponse(batch.as_json())

    async def _list_batches(self, request: Request) -> Response:
        limit, after = _number(request, "limit", 20, 100), request.query_params.get("after")
        store, _ = await self._open()
        return _listed([batch.as_json() for batch in await store.batches(after=after, limit=limit + 1)], limit)

    async def _get_batch(self, request: Request) -> Response:
        store, _ = await self._open()
        return JSONResponse((await store.batch(request.path_params["id"])).as_json())

    async def _cancel(self, request: Request) -> Response:
        store, runner = await self._open()
        batch = await store.cancel(request.path_params["id"])
        runner.cancel(batch.id)
        return JSONResponse(batch.as_json())


class BatchLife:
    """ASGI middleware that tells the API when the server's event loop begins and ends."""

    def __init__(self, app: App, api: BatchApi) -> None:
        self._app, self._api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""
        if scope["type"] != "lifespan":
            return await self._app(scope, receive, send)
        self._api.alive(asyncio.get_running_loop())
        try:
            await self._app(scope, receive, send)
        finally:
            await self._api.close()


def _answering(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ApiError as error:
            return JSONResponse(error.body(), error.status)

    return answer


def _listed(entries: list[dict[str, Any]], limit: int) -> Response:
    shown = entries[:limit]
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return JSONResponse({"object": "list", "data": shown, **ends, "has_more": len(entries) > limit})


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise ApiError(400, f"{name}: {text!r}: use 1 to {most}", param=name)
    return int(text)


def _too_large() -> ApiError:
    return ApiError(413, f"file: larger than {MOST_FILE_BYTES // 10**6} MB; send it as several", param="file")
