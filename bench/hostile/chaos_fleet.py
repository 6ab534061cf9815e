"""The HTTP router in front of two servers: a server killed, one stopped, the router itself killed."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from hostile.disturb import Load, Result, disturbed, note_end, signalled, stopped
from hostile.servers import Place, Running, route, serve

# So that a worker that came back is seen soon; the default asks once a minute.
_ROUTER_FLAGS = ("--health-check-interval-secs", "2", "--worker-startup-check-interval", "2")


class Fleet:
    """Two servers with one rank each, and the router."""

    def __init__(self, here: Place, model: Path) -> None:
        self._here, self._model = here, model
        self.servers = [self._serve(0, None), self._serve(1, None)]
        for server in self.servers:
            server.wait_ready(word=" ready in ")
        self.router = route(here, [server.url for server in self.servers], *_ROUTER_FLAGS)
        self.router.wait_ready("/readiness")

    def _serve(self, number: int, port: int | None) -> Running:
        folder = str(self._here.folder / f"batches-{number}")
        flags = ("--dp-size", "1", "--asyncep-batch-dir", folder)
        return serve(self._here, self._model, *flags, name=f"server-{number}", port=port)

    def start_again(self, number: int) -> float:
        """Seconds from the start to the first answer."""
        began = time.monotonic()
        port = int(self.servers[number].url.rsplit(":", 1)[1])
        self.servers[number] = self._serve(number, port)
        self.servers[number].wait_ready(word=" ready in ")
        return round(time.monotonic() - began, 2)

    def healthy(self) -> int:
        with contextlib.suppress(OSError, ValueError, KeyError):
            workers = self.router.get("/router/state", 5.0)["workers"]
            return sum(bool(worker["is_healthy"]) for worker in workers)
        return 0

    def stop(self) -> None:
        for running in (self.router, *self.servers):
            running.stop()


@contextlib.contextmanager
def fleet(here: Place, model: Path) -> Iterator[Fleet]:
    """Ready; ended afterwards."""
    made = Fleet(here, model)
    try:
        yield made
    finally:
        made.stop()


async def cases(two: Fleet, here: Place, load: Load, seconds: float) -> AsyncIterator[Result]:
    """Every request that comes through the router is answered right, by whoever is left."""

    def router_ended() -> bool:
        return two.router.process.poll() is not None

    first, second = two.servers
    rank = first.roles()["rank 0"]
    yield await disturbed(
        "router: kill -9 a server's rank",
        two.router.url,
        signalled(rank.pid, signal.SIGKILL),
        load,
        lambda: first.answers() and two.healthy() == 2,
        router_ended,
    )
    front = second.roles()["front"]
    yield await disturbed(
        f"router: SIGSTOP a server's front for {seconds:g} s",
        two.router.url,
        stopped(front.pid, seconds),
        load,
        lambda: two.healthy() == 2,
        router_ended,
    )
    # The other one answers; this one is started again, and the router has to find it.
    result = await disturbed(
        "router: kill -9 a server",
        two.router.url,
        signalled(second.process.pid, signal.SIGKILL),
        load,
        lambda: two.healthy() == 1,
        router_ended,
    )
    left = second.leave()
    result.left_running = [f"{process.pid}" for process in left]
    result.more["started_again_s"] = two.start_again(1)
    deadline = time.monotonic() + 60
    while two.healthy() < 2 and time.monotonic() < deadline:
        time.sleep(0.1)  # polling another process over HTTP: there is nothing to wait on
    result.more["healthy_workers_after"] = two.healthy()
    yield result
    result = await disturbed(
        "router: kill -9 the router",
        two.router.url,
        signalled(two.router.process.pid, signal.SIGKILL),
        load,
        lambda: False,
        router_ended,
    )
    note_end(result, two.router, here)
    began = time.monotonic()
    port = int(two.router.url.rsplit(":", 1)[1])
    two.router = route(here, [server.url for server in two.servers], *_ROUTER_FLAGS, port=port)
    two.router.wait_ready("/readiness")
    result.serves_again_s = round(time.monotonic() - began, 2)
    yield result
