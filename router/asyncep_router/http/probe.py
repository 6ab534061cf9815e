"""Asks a server what it is: its model, its ranks, its cache. Older and newer SGLang alike."""

from __future__ import annotations

from typing import Any

import aiohttp
import orjson

from asyncep_router.http.worker import WorkerInfo


class ProbeError(Exception):
    """The worker does not answer as an SGLang server would."""


async def ask(
    session: aiohttp.ClientSession, url: str, path: str, api_key: str | None, seconds: float
) -> tuple[int, bytes]:
    """GET a path; (status, body). Raises `ProbeError`, the cause chained."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        limit = aiohttp.ClientTimeout(total=seconds)
        async with session.get(url + path, headers=headers, timeout=limit) as response:
            return response.status, await response.read()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ProbeError(f"{path}: {type(error).__name__} {error}".strip()) from error


async def discover(session: aiohttp.ClientSession, url: str, api_key: str | None, seconds: float) -> WorkerInfo:
    """What the server says of itself; what it does not say gets the defaults. Raises `ProbeError`."""
    model = await _first(session, url, ("/model_info", "/get_model_info"), api_key, seconds)
    server = await _first(session, url, ("/server_info", "/get_server_info"), api_key, seconds)
    ours = await _first(session, url, ("/asyncep/status",), api_key, seconds)
    return read(model, server, ours)


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
        gathers=bool(ours.get("gathers")),
        version=server.get("version"),
    )


async def _first(
    session: aiohttp.ClientSession, url: str, paths: tuple[str, ...], api_key: str | None, seconds: float
) -> dict[str, Any]:
    """The body of the first path that the server has; empty if it has none."""
    for path in paths:
        status, body = await ask(session, url, path, api_key, seconds)
        if status == 200:
            try:
                found = orjson.loads(body)
            except orjson.JSONDecodeError as error:
                raise ProbeError(f"{path}: not JSON") from error
            return found if isinstance(found, dict) else {}
        if status not in (404, 405):
            raise ProbeError(f"{path}: status {status}")
    return {}
