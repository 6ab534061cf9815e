"""Asks a server what it is: its model, its ranks, its cache. Older and newer SGLang alike."""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from asyncep_router.http.worker import WorkerInfo

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncep_router.http.worker import Worker

QUESTION_ID = "asyncep-router-question"
"""The request id of the router's own questions, for workers' logs."""

_MODEL = ("/model_info", "/get_model_info")
_WANTS_KEY = (401, 403)


_MOST_BYTES = 4 * 2**20
"""An answer about itself has no more than this."""


class ProbeError(Exception):
    """The worker does not answer as an SGLang server would.

    Attributes:
        slow: it did not answer in time.
        gone: nobody listens there, or the connection broke.
    """

    def __init__(self, message: str, *, slow: bool = False, gone: bool = False) -> None:
        super().__init__(message)
        self.slow = slow
        self.gone = gone


class Answer(Enum):
    """What became of a question that any working server can answer."""

    WORKS = "works"
    FAILS = "fails"
    SILENCE = "silence"
    UNCLEAR = "unclear"
    """It refuses or is busy, which says nothing about its work."""


async def ask(
    session: aiohttp.ClientSession, url: str, path: str, headers: Mapping[str, str], seconds: float
) -> tuple[int, bytes]:
    """GET a path; (status, body). Raises `ProbeError`, the cause chained."""
    try:
        limit = aiohttp.ClientTimeout(total=seconds)
        async with session.get(url + path, headers=headers, timeout=limit, allow_redirects=False) as response:
            return response.status, await read_answer(response)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        slow = isinstance(error, TimeoutError)
        gone = not slow and isinstance(error, aiohttp.ClientConnectionError | OSError)
        raise ProbeError(f"{path}: {type(error).__name__} {error}".strip(), slow=slow, gone=gone) from error


async def read_answer(response: aiohttp.ClientResponse, most: int = _MOST_BYTES) -> bytes:
    """A body of at most so many bytes. Raises `aiohttp.ClientPayloadError` for a longer one."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > most:
            raise aiohttp.ClientPayloadError(f"the answer has more than {most} bytes")
    return bytes(body)


async def prove(session: aiohttp.ClientSession, url: str, health: str, seconds: float) -> None:
    """Ask without any key whether it behaves as a server of SGLang's kind. Raises `ProbeError`.

    Such a server is healthy, and either says what its model is or wants a key before it does. Only then is a key sent
    there, and only the one that was meant for this URL.
    """
    status, _ = await ask(session, url, health, {}, seconds)
    if status not in (200, *_WANTS_KEY):
        raise ProbeError(f"{health}: status {status}")
    for path in _MODEL:
        status, body = await ask(session, url, path, {}, seconds)
        if status in _WANTS_KEY:
            return
        if status == 200:
            about = _json(path, body)
            if not any(field in about for field in ("model_path", "served_model_name", "is_generation")):
                raise ProbeError(f"{path}: does not describe a model; is this a server of SGLang's kind?")
            return
        if status not in (404, 405):
            raise ProbeError(f"{path}: status {status}")
    raise ProbeError(f"{_MODEL[0]}: no such endpoint; is this a server of SGLang's kind?")


async def question(session: aiohttp.ClientSession, worker: Worker, generates: bool, seconds: float) -> Answer:
    """Let it compute two tokens. Takes at most so many seconds."""
    if generates:
        path, fields = "/generate", {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 0}}
    else:
        path, fields = "/encode", {"input_ids": [1, 2]}
    headers = {**worker.headers(), "Content-Type": "application/json", "x-request-id": QUESTION_ID}
    try:
        async with (
            asyncio.timeout(seconds),
            session.post(
                worker.url + path, data=orjson.dumps(fields), headers=headers, allow_redirects=False
            ) as response,
        ):
            await read_answer(response)
    except TimeoutError:
        return Answer.SILENCE
    except (aiohttp.ClientError, OSError):
        return Answer.FAILS
    if response.status >= 500:
        return Answer.FAILS
    return Answer.WORKS if response.status == 200 else Answer.UNCLEAR


async def discover(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], seconds: float) -> WorkerInfo:
    """What the server says of itself; what it does not say gets the defaults. Raises `ProbeError`."""
    model = await _first(session, url, _MODEL, headers, seconds)
    server = await _first(session, url, ("/server_info", "/get_server_info"), headers, seconds)
    ours = await _first(session, url, ("/asyncep/status",), headers, seconds, needed=False)
    try:
        return read(model, server, ours)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProbeError(f"/server_info: not what a server of SGLang's kind says of itself: {error}") from error


def read(model: dict[str, Any], server: dict[str, Any], ours: dict[str, Any]) -> WorkerInfo:
    """The same from the answers' bodies: `/model_info`, `/server_info` and `/asyncep/status`, empty if missing."""
    tokens = server.get("max_total_num_tokens") or server.get("max_total_tokens")
    chunk = server.get("chunked_prefill_size")
    return WorkerInfo(
        model_path=model.get("model_path") or server.get("model_path"),
        tokenizer_path=model.get("tokenizer_path") or server.get("tokenizer_path"),
        model_name=model.get("served_model_name") or server.get("served_model_name"),
        model_type=model.get("model_type"),
        generates=bool(model.get("is_generation", True)),
        ranks=max(1, int(server.get("dp_size") or 1)),
        page_size=max(1, int(server.get("page_size") or 1)),
        cache_tokens=int(tokens) if isinstance(tokens, int) and tokens > 0 else None,
        caches=not server.get("disable_radix_cache", False),
        chunk_tokens=chunk if isinstance(chunk, int) and chunk > 0 else 0,
        multi_item=bool(server.get("enable_mis", False)),
        layer_threshold=float(ours.get("threshold_flops_per_layer") or 0),
        # Servers before 0.3 do not say it.
        gathers=bool(ours.get("waits_for_weights", bool(ours.get("gathers")))),
        version=server.get("version"),
    )


async def _first(
    session: aiohttp.ClientSession,
    url: str,
    paths: tuple[str, ...],
    headers: Mapping[str, str],
    seconds: float,
    *,
    needed: bool = True,
) -> dict[str, Any]:
    """The body of the first path that the server has; empty if it has none, or keeps to itself what is not `needed`."""
    for path in paths:
        status, body = await ask(session, url, path, headers, seconds)
        if status == 200:
            return _json(path, body)
        if status in _WANTS_KEY and needed:
            raise ProbeError(f"{path}: status {status}: the worker wants another key (--worker-api-key, or api_key)")
        if status not in (404, 405) and needed:
            raise ProbeError(f"{path}: status {status}")
    return {}


def _json(path: str, body: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ProbeError(f"{path}: not JSON") from error
    return found if isinstance(found, dict) else {}
