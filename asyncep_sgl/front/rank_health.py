"""``/health`` and ``/health_generate`` from what the router inside the engine knows, without a pass of any rank.

SGLang answers them with a pass of its own, which waits behind the prompts that are there: a busy server looks ill, and
whoever checks it takes it out. Here a server is well if a rank serves, that is, lives and moves: one that does not is
ended and started again by the router. A rank that is back has computed a token before it counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asyncep_sgl.front.questions import RankThere
from asyncep_sgl.router.state import router_health

PATHS = ("/health", "/health_generate")
_PATIENCE_MS = 800
# A router that decides about thousands of requests may be late once; one that is gone for so long is not there.
_STALE_SECONDS = 10.0


@dataclass
class RankHealth:
    """Asks the router and remembers what it said.

    Attributes:
        address: the router's.
        ready: why SGLang's front takes no requests; None if it does.
        clock: seconds.
    """

    address: str
    ready: Callable[[], str | None]
    clock: Callable[[], float] = time.monotonic
    _last: dict[str, Any] | None = None
    _at: float = 0.0

    def look(self) -> dict[str, Any] | None:
        """What the router says, or has said lately; None if it is not heard. Blocks for a moment."""
        try:
            self._last = router_health(self.address, _PATIENCE_MS)
            self._at = self.clock()
        except TimeoutError:
            if self.clock() - self._at > _STALE_SECONDS:
                self._last = None
        return self._last

    def ranks_there(self) -> set[RankThere] | None:
        """For `asyncep_sgl.front.questions`."""
        found = self.look()
        return None if found is None else {RankThere(*entry) for entry in found["serving"]}

    def verdict(self) -> tuple[int, dict[str, Any]]:
        """Status and body of an answer. Blocks for a moment."""
        reason = self.ready()
        if reason is None:
            found = self.look()
            if found is None:
                reason = "the router inside the server does not answer"
            elif not found["serving"]:
                starting = ", ".join(map(str, found["starting"])) or "none"
                reason = f"no rank serves; being started again: {starting}"
            else:
                silent = max(found["silent_seconds"].values(), default=0.0)
                return 200, {"ranks": len(found["serving"]), "silent_seconds": round(silent, 1)}
        return 503, {"error": {"message": reason, "code": 503}}

    def routes(self) -> list[Route]:
        """To stand before SGLang's own."""
        return [Route(path, self._answer, methods=["GET"]) for path in PATHS]

    async def _answer(self, _: Request) -> Response:
        status, body = await asyncio.to_thread(self.verdict)
        return JSONResponse(body, status)
