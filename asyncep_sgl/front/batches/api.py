"""The routes of the Batch API, and its life inside SGLang's server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import orjson
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from asyncep_router.keys import Keys
from asyncep_router.rates import Rates
from asyncep_sgl.errors import UsageError
from asyncep_sgl.front.batches.bounds import Bounds, names_of
from asyncep_sgl.front.batches.disk import Damaged, DiskError
from asyncep_sgl.front.batches.files import too_large
from asyncep_sgl.front.batches.form import read_form
from asyncep_sgl.front.batches.records import MOST_FILE_BYTES, ApiError, expiry_seconds, read_order, shown
from asyncep_sgl.front.batches.runner import BatchRunner
from asyncep_sgl.front.batches.store import BatchStore, end_in_order, open_store
from asyncep_sgl.front.passage import caller

logger = logging.getLogger("asyncep")

# What a form has around the file, and the most that an order may be.
_FORM_BYTES = 1 << 20
_ORDER_BYTES = 1 << 20
# Between two looks for what has had its time.
_SWEEP_SECONDS = 60.0
# More than any number here has; Python reads no number of thousands of digits.
_DIGITS = 18
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


class BatchApi:
    """Files and batches of one server. Its folder is made when the first file comes.

    Args:
        app: the server's whole application; a batch's requests are sent through it.
        folder: where the state is kept.
        model: what the server serves.
        most: requests of batches under way at a time.
        bounds: what the operator allows.
        keys: of the server.
        rates: prompts of batches' lines, apart from their owners' other requests.
    """

    def __init__(
        self,
        app: Starlette,
        folder: Path,
        model: str,
        *,
        most: int,
        bounds: Bounds | None = None,
        keys: Keys | None = None,
        rates: Rates | None = None,
    ) -> None:
        self._folder, self._model, self._most, self._bounds = folder, model, most, bounds or Bounds()
        self._keys, self._rates = keys or Keys(), rates or Rates()
        self._opened: tuple[BatchStore, BatchRunner] | None = None
        self._opening = asyncio.Lock()
        self._ended = False
        self._said = ""
        self._stack = contextlib.AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),
            base_url="http://batch",
            timeout=None,
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
        """Goes on as soon as the state can be used: after a restart on a full disk, once there is space."""
        pause, said = _FIRST_PAUSE, ""
        while not self._ended:
            try:
                await self._open()
                return
            except ApiError as error:
                if error.message != said:
                    logger.error("batches are not gone on with: %s", error.message)
                said = error.message
            except Exception:
                logger.exception("batches are not gone on with, for an error that was not foreseen")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def alive(self, loop: asyncio.AbstractEventLoop) -> None:
        """The server's event loop has started."""
        self._loop = loop

    async def close(self) -> None:
        """Stops; what is unfinished is kept. Again it does nothing."""
        self._ended = True
        # Not before what is being opened is open, so that it is closed too.
        async with self._opening:
            await self._stack.aclose()
            self.end()
            self._opened = None
        await self._client.aclose()

    def end(self) -> None:
        """The process ends and no request is under way: none of a batch's is why."""
        if self._opened is not None:
            end_in_order(self._folder)

    async def _open(self) -> tuple[BatchStore, BatchRunner]:
        async with self._opening:
            if self._ended:
                raise ApiError(503, "the server is stopping; send the request again to another")
            if self._opened is None:
                store, runner = await self._opened_now()
                self._opened = store, runner
            return self._opened

    async def _opened_now(self) -> tuple[BatchStore, BatchRunner]:
        async with contextlib.AsyncExitStack() as stack:
            try:
                store = await stack.enter_async_context(open_store(self._folder, bounds=self._bounds))
            except UsageError as error:
                # Where the folder is, is not the client's.
                self._say(str(error))
                raise ApiError(503, "the server cannot use its --asyncep-batch-dir; its log says why") from error
            except Damaged as error:
                self._say(f"--asyncep-batch-dir {self._folder}: {error.message}")
                raise
            runner = BatchRunner(
                store,
                self._model,
                self._send,
                most=self._most,
                caller_named=self._keys.named,
                rates=self._rates,
            )
            stack.push_async_callback(runner.close)
            await runner.resume()
            sweeper = asyncio.create_task(_sweep(store, runner))
            stack.callback(sweeper.cancel)
            # All is well: it is undone when the server ends.
            self._stack.push_async_exit(stack.pop_all())
        return store, runner

    def _say(self, message: str) -> None:
        """Logs why the folder cannot be used, once however many ask."""
        if message != self._said:
            logger.error("%s", message)
        self._said = message

    async def _send(self, path: str, body: bytes) -> tuple[int, bytes]:
        answer = await self._client.post(path, content=body, headers={"content-type": "application/json"})
        if answer.headers.get("content-type", "").startswith("application/json"):
            return answer.status_code, answer.content
        return answer.status_code, orjson.dumps({"error": {"message": answer.text, "code": answer.status_code}})

    # Files

    async def _upload(self, request: Request) -> Response:
        length = _length(request)
        if length is not None and length > MOST_FILE_BYTES + _FORM_BYTES:
            raise too_large()
        store, _ = await self._open()
        async with await store.files.upload(caller.get()) as upload:
            if length is not None:
                # Said before it is sent, if it is more than the form's own bytes over the quota.
                upload.expect(length - _FORM_BYTES)
            content_type = request.headers.get("content-type", "")
            form = await read_form(content_type, request.stream(), MOST_FILE_BYTES + _FORM_BYTES, upload.write)
            if form.filename is None:
                raise ApiError(400, "file: a file is needed, sent as multipart/form-data", param="file")
            if (purpose := form.fields.get("purpose")) != "batch":
                raise ApiError(400, f"purpose: {shown(purpose)}: only 'batch' is served here", param="purpose")
            prefix = "expires_after["
            expiry = {key[len(prefix) : -1]: value for key, value in form.fields.items() if key.startswith(prefix)}
            seconds = expiry_seconds(expiry or None, "expires_after")
            record = await upload.keep(form.filename or "batch.jsonl", seconds)
        return JSONResponse(record.as_json())

    async def _list_files(self, request: Request) -> Response:
        limit, after = _number(request, "limit", 10_000, 10_000), request.query_params.get("after")
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise ApiError(400, f"order: {shown(order)}: use asc or desc", param="order")
        store, _ = await self._open()
        purpose = request.query_params.get("purpose")
        files = await store.files.page(
            owners=names_of(caller.get()), purpose=purpose, after=after, limit=limit + 1, newest=order == "desc"
        )
        return _listed([file.as_json() for file in files], limit)

    async def _get_file(self, request: Request) -> Response:
        store, _ = await self._open()
        return JSONResponse((await store.files.get(request.path_params["id"], names_of(caller.get()))).as_json())

    async def _delete_file(self, request: Request) -> Response:
        store, runner = await self._open()
        await store.files.delete(request.path_params["id"], names_of(caller.get()))
        runner.look_again()
        return JSONResponse({"id": request.path_params["id"], "object": "file", "deleted": True})

    async def _content(self, request: Request) -> Response:
        store, _ = await self._open()
        file = await store.files.get(request.path_params["id"], names_of(caller.get()))
        path = store.files.path(file.id)
        if not path.is_file():
            message = f"the contents of {file.id} are gone; delete it and upload it again"
            raise ApiError(410, message, param="file_id", code="contents_gone")
        return FileResponse(path, media_type="application/jsonl", filename=file.filename)

    # Batches

    async def _create(self, request: Request) -> Response:
        try:
            body = orjson.loads(await _body(request))
        except orjson.JSONDecodeError as error:
            raise ApiError(400, f"the body is not JSON: {error}") from error
        order = read_order(body)
        store, runner = await self._open()
        batch = await store.add_batch(order, self._model, caller.get())
        runner.begin(batch)
        return JSONResponse(batch.as_json())

    async def _list_batches(self, request: Request) -> Response:
        limit, after = _number(request, "limit", 20, 100), request.query_params.get("after")
        store, runner = await self._open()
        batches = await store.batches(owners=names_of(caller.get()), after=after, limit=limit + 1)
        return _listed([batch.as_json(runner.waits(batch.id)) for batch in batches], limit)

    async def _get_batch(self, request: Request) -> Response:
        store, runner = await self._open()
        batch = await store.batch(request.path_params["id"], names_of(caller.get()))
        return JSONResponse(batch.as_json(runner.waits(batch.id)))

    async def _cancel(self, request: Request) -> Response:
        store, runner = await self._open()
        batch = await store.cancel(request.path_params["id"], names_of(caller.get()))
        runner.cancel(batch.id)
        return JSONResponse(batch.as_json(runner.waits(batch.id)))


class BatchLife:
    """ASGI middleware that tells the API when the server's event loop begins and ends."""

    def __init__(self, app: ASGIApp, api: BatchApi) -> None:
        self._app, self._api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""
        if scope["type"] != "lifespan":
            return await self._app(scope, receive, send)
        self._api.alive(asyncio.get_running_loop())

        async def close_first(message: MutableMapping[str, Any]) -> None:
            # Whoever has heard that the end is complete stops the loop.
            if message["type"].startswith("lifespan.shutdown."):
                await self._api.close()
            await send(message)

        try:
            await self._app(scope, receive, close_first)
        finally:
            await self._api.close()


def _answering(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ApiError as error:
            return JSONResponse(error.body(), error.status)
        except ClientDisconnect:
            # Nobody is there to read it.
            return JSONResponse({}, 400)

    return answer


async def _sweep(store: BatchStore, runner: BatchRunner) -> None:
    """Forgets, every minute, what has had its time."""
    while True:
        try:
            await store.sweep()
        except DiskError as error:
            logger.warning("expired files stay for now: %s", error.message)
        except Exception:
            logger.exception("expired files stay for now")
        runner.look_again()
        await asyncio.sleep(_SWEEP_SECONDS)


async def _body(request: Request) -> bytes:
    """The body of an order."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _ORDER_BYTES:
            raise ApiError(413, f"the body is larger than {_ORDER_BYTES} bytes; requests belong into a file")
    return bytes(body)


def _length(request: Request) -> int | None:
    """What a request says of its length; None where it says nothing that is a length."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _DIGITS else None


def _listed(entries: list[dict[str, Any]], limit: int) -> Response:
    shown = entries[:limit]
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return JSONResponse({"object": "list", "data": shown, **ends, "has_more": len(entries) > limit})


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS and 1 <= int(text) <= most):
        raise ApiError(400, f"{name}: {shown(text)}: use 1 to {most}", param=name)
    return int(text)
