"""A server with the HTTP router in front of it, for the fuzz and the soak. What has ended is started again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import psutil

from hostile.servers import ADMIN_KEY, KEY, PASSING, Place, place, route, serve

_WHOLE_SECONDS = 60.0


class Stand:
    """Both, and their processes by role. ``urls``: the server's own and the router's."""

    key: str = KEY
    secrets: Sequence[str] = (KEY, ADMIN_KEY)

    def __init__(self, here: Place, model: Path, flags: tuple[str, ...] = ()) -> None:
        self._here, self._model, self._flags = here, model, flags
        self.server = serve(here, model, *self._server_flags())
        self.router = route(here, [self.server.url])
        self.urls: Sequence[str] = (self.server.url, self.router.url)
        self.starts = 1

    def _server_flags(self) -> tuple[str, ...]:
        return ("--asyncep-batch-dir", str(self._here.folder / "batches"), *self._flags)

    async def ready(self) -> None:
        await asyncio.to_thread(self.server.wait_ready, word=" ready in ")
        await asyncio.to_thread(self.router.wait_ready, "/readiness")

    def roles(self) -> dict[str, psutil.Process]:
        """Every process that is to stay."""
        if self.server.process.poll() is not None or self.router.process.poll() is not None:
            return {}
        found = {name: process for name, process in self.server.roles().items() if name not in PASSING}
        with contextlib.suppress(psutil.Error):
            found["http router"] = psutil.Process(self.router.process.pid)
        return found

    def processes(self) -> dict[str, int]:
        return {name: process.pid for name, process in self.roles().items()}

    async def revive(self) -> None:
        """Starts what has ended; returns once every rank is there and the server answers, or after a minute."""
        if self.server.process.poll() is not None:
            await asyncio.to_thread(self.server.leave)
            port = int(self.server.url.rsplit(":", 1)[1])
            self.server = serve(self._here, self._model, *self._server_flags(), port=port)
            self.starts += 1
            await asyncio.to_thread(self.server.wait_ready, word=" ready in ")
        if self.router.process.poll() is not None:
            self.router = route(self._here, [self.server.url], port=int(self.router.url.rsplit(":", 1)[1]))
            self.starts += 1
            await asyncio.to_thread(self.router.wait_ready, "/readiness")
        deadline = time.monotonic() + _WHOLE_SECONDS
        while time.monotonic() < deadline and not await asyncio.to_thread(self.whole):
            await asyncio.sleep(0.1)

    def whole(self) -> bool:
        """Whether the server answers and every rank is there."""
        with contextlib.suppress(OSError, ValueError):
            return bool(all(self.server.get("/router/state")["alive"])) and self.server.answers()
        return False

    def stop(self) -> list[str]:
        """Ends both; returns the names of what stayed."""
        left = self.router.stop() + self.server.stop()
        return [f"{process.pid}" for process in left]


@contextlib.asynccontextmanager
async def stand(model: Path, *flags: str) -> AsyncIterator[Stand]:
    """Both, ready; ended afterwards whatever happens."""
    with place() as here:
        both = Stand(here, model, flags)
        try:
            await both.ready()
            yield both
        finally:
            both.stop()
