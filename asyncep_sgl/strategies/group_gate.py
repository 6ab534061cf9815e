"""The front's answer when a host of the group is away and nobody else has its experts: wait a while, then say so."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from asyncep_sgl.experts.group.peers import View
from asyncep_sgl.experts.group.view import ViewClient

_LOOK_SECONDS = 0.5
# What those ask who balance load. SGLang would say that all is well as long as any answer comes, a cancellation too.
_HEALTH = ("/health", "/health_generate")


def uncovered(dead: Collection[int], nodes: int, copies: int) -> bool:
    """Whether some expert lies only on dead hosts: its copies are on ``copies`` hosts in a row, cyclically."""
    return any(all((home + copy) % nodes in dead for copy in range(copies)) for home in range(nodes))


@dataclass
class GroupHealth:
    """Since when requests cannot be computed. Fed by a thread, read by the event loop.

    Attributes:
        nodes, copies: the group's.
        patience: seconds.
        clock: seconds.
    """

    nodes: int
    copies: int
    patience: float
    clock: Callable[[], float] = time.monotonic
    _since: float | None = None
    _away: tuple[str, ...] = ()

    def saw(self, view: View) -> None:
        """The group as the exporter sees it now."""
        dead = {node.node for node in view.nodes if not node.alive} | set(view.absent)
        if not uncovered(dead, self.nodes, self.copies):
            self._since = None
            return
        self._away = tuple(f"{n.node} ({n.address})" for n in view.nodes if not n.alive)
        if self._since is None:
            self._since = self.clock()

    def refusal(self) -> str | None:
        """Why nothing can be answered; None while all is well or a request may still wait."""
        since = self._since
        if since is None or self.clock() - since < self.patience:
            return None
        return (
            f"the experts of node {', '.join(self._away)} have been out of reach for {self.clock() - since:.0f} s; "
            "start that host again, or send the request later"
        )


@dataclass
class GroupGate:
    """ASGI middleware: refuses what cannot be computed with 503, new requests and those that have waited too long.

    Checks of health are answered alike.
    """

    app: ASGIApp
    health: GroupHealth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or (scope["method"] != "POST" and scope["path"] not in _HEALTH):
            await self.app(scope, receive, send)
            return
        started = False

        async def note(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        if (reason := self.health.refusal()) is None:
            request = asyncio.ensure_future(self.app(scope, receive, note))
            while not (await asyncio.wait({request}, timeout=_LOOK_SECONDS))[0]:
                reason = self.health.refusal()
                if reason is not None and not started:
                    request.cancel()
                    break
            else:
                await request
                return
            await asyncio.wait({request})
            if started or reason is None:
                return
        body = json.dumps({"error": {"message": reason, "code": 503}}).encode()
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"5")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def watch(health: GroupHealth, views: ViewClient) -> None:
    """Starts a thread that keeps ``health`` up to date for as long as the process lives. ``views`` is its own then."""

    def run() -> None:
        while True:
            health.saw(views.view(descriptors=False))
            time.sleep(_LOOK_SECONDS)

    threading.Thread(target=run, name="asyncep-group", daemon=True).start()
