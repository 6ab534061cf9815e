"""Exchanges with workers: one HTTP request each, its failures named, its load and time limit booked."""

from __future__ import annotations

from asyncio import timeout
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp

from asyncep_router.http.errors import WorkerTimeout, WorkerUnreachable
from asyncep_router.http.judgement import Outcome
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
    worker was given up meanwhile). The fleet is told of failed connections, which concern every request; whose fault
    a failure is, `judgement` finds.
    """
    limit = timeout(seconds)
    worker.started(limit)
    try:
        # A redirect would carry the client's prompt and the worker's key to wherever it points.
        async with (
            limit,
            session.post(worker.url + path, data=body, headers=headers, allow_redirects=False) as response,
        ):
            yield response
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        reason = f"{type(error).__name__}: {error}"
        fleet.unconnected(worker, reason)
        raise WorkerUnreachable(f"worker {worker.url}: {reason}", Outcome.UNCONNECTED) from error
    except (aiohttp.ClientError, ConnectionError) as error:
        reason = f"{type(error).__name__}: {error}"
        fleet.dropped(worker, reason)
        raise WorkerUnreachable(f"worker {worker.url}: {reason}") from error
    except TimeoutError as error:
        if worker.phase is Phase.DRAINING:
            raise WorkerUnreachable(f"worker {worker.url} was removed", Outcome.GIVEN_UP) from error
        if worker.phase in (Phase.UNHEALTHY, Phase.SUSPECT):
            raise WorkerUnreachable(f"worker {worker.url} was given up: {worker.last_error}") from error
        raise WorkerTimeout(f"worker {worker.url}: no answer within {seconds:g} s") from error
    finally:
        worker.ended(limit)
