"""Exchanges with workers: one HTTP request each, its failures named, its load and time limit booked."""

from __future__ import annotations

from asyncio import timeout
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp

from asyncep_router.http.errors import WorkerTimeout, WorkerUnreachable
from asyncep_router.http.worker import Phase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from asyncep_router.http.fleet import Fleet
    from asyncep_router.http.worker import Worker

# uvicorn closes idle connections after 5 s; ours must be gone before, or a request may meet the closing.
_KEEP_ALIVE_SECONDS = 4.0
_CONNECT_SECONDS = 5.0


def make_session() -> aiohttp.ClientSession:
    """Connections to all workers; how many is decided by the gate, not here."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept-Encoding"),
    )


@asynccontextmanager
async def exchange(
    session: aiohttp.ClientSession,
    fleet: Fleet,
    worker: Worker,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    seconds: float,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """POST to a worker and look at the answer while the context is open.

    Raises `WorkerTimeout` (nothing within `seconds`), `WorkerUnreachable` (no connection, or it broke, or the
    worker was given up meanwhile). The fleet is told of both.
    """
    limit = timeout(seconds)
    worker.started(limit)
    try:
        async with limit, session.post(worker.url + path, data=body, headers=headers) as response:
            yield response
    except (aiohttp.ClientError, ConnectionError) as error:
        reason = f"{type(error).__name__}: {error}"
        fleet.unreachable(worker, reason)
        raise WorkerUnreachable(f"worker {worker.url}: {reason}") from error
    except TimeoutError as error:
        if worker.phase in (Phase.UNHEALTHY, Phase.DRAINING, Phase.SUSPECT):
            raise WorkerUnreachable(f"worker {worker.url} was given up: {worker.last_error}") from error
        reason = f"no answer within {seconds:g} s"
        fleet.failed(worker, reason)
        raise WorkerTimeout(f"worker {worker.url}: {reason}") from error
    finally:
        worker.ended(limit)
