"""A worker as the router knows it: one URL, the ranks behind it, its health and its circuit."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from asyncep_router.http.breaker import Breaker, BreakerState
from asyncep_router.http.public import public_name


class Phase(StrEnum):
    """`suspect`: a connection just failed, and a check is under way. Only `ready` takes requests."""

    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"


@dataclass(frozen=True)
class WorkerInfo:
    """What a server says of itself. `ranks`: data-parallel ranks. `cache_tokens`: size of a rank's cache,
    None if unknown. `chunk_tokens`: tokens of its largest prefill batch, 0 if unknown.
    `multi_item`: it packs items of a score request into one sequence (`--enable-mis`).
    `layer_threshold`: T in FLOPs per layer, if it says one, else 0. `gathers`: it gathers weights for each batch, and
    T is what hides that.
    """

    model_path: str | None = None
    tokenizer_path: str | None = None
    model_name: str | None = None
    model_type: str | None = None
    generates: bool = True
    ranks: int = 1
    page_size: int = 1
    cache_tokens: int | None = None
    caches: bool = True
    chunk_tokens: int = 0
    multi_item: bool = False
    layer_threshold: float = 0.0
    gathers: bool = False
    version: str | None = None


@dataclass(eq=False)
class Worker:
    """See the module. `ranks`: the placement's numbers, by data-parallel rank."""

    url: str
    breaker: Breaker
    api_key: str | None = field(default=None, repr=False)
    """Sent to it once it is `proven`."""
    admin_key: str | None = field(default=None, repr=False)
    """The same, for emptying its cache and ending requests."""
    labels: dict[str, str] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    phase: Phase = Phase.STARTING
    info: WorkerInfo | None = None
    ranks: tuple[int, ...] = ()
    failures: int = 0
    """Failed health checks in a row."""
    successes: int = 0
    """Successful health checks in a row."""
    proven: bool = False
    """It has answered without a key as a server of SGLang's kind does. Untrue again when it was unreachable: another
    process may listen there now."""
    heard_at: float = float("-inf")
    """When an answer to a request came last, on the event loop's clock."""
    outage_booked: bool = False
    """Since it was suspected a failure was booked: many requests may meet one outage, which is one failure."""
    questioned_at: float = float("-inf")
    """When the router asked it a question of its own last."""
    died: bool = False
    """It was unreachable since it last served, so its cache is taken to be empty."""
    last_error: str | None = None
    attempts: set[asyncio.Timeout] = field(default_factory=set)
    """The time limits of requests in flight; ending them early is how a lost worker lets go of its requests."""
    active: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    check_now: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def accepting(self) -> bool:
        """Whether requests may be sent to it."""
        return self.phase is Phase.READY and self.breaker.state is not BreakerState.OPEN

    def heard(self, now: float) -> None:
        """A request was answered, or a piece of an answer came: it is alive and moving, however slow its checks are."""
        self.heard_at = now
        self.failures = 0

    def headers(self, *, admin: bool = False) -> dict[str, str]:
        """What it needs to let the router in."""
        key = (admin and self.admin_key) or self.api_key
        return {"Authorization": f"Bearer {key}"} if key and self.proven else {}

    def started(self, attempt: asyncio.Timeout) -> None:
        """A request is sent to it."""
        self.active += 1
        self.attempts.add(attempt)
        self.idle.clear()

    def ended(self, attempt: asyncio.Timeout) -> None:
        """That request is answered or given up."""
        self.active -= 1
        self.attempts.discard(attempt)
        if not self.active:
            self.idle.set()

    def let_go(self) -> None:
        """End every request in flight: the worker is lost. They are tried elsewhere."""
        now = asyncio.get_running_loop().time()
        for attempt in list(self.attempts):
            # One that expires this very moment refuses; it ends all the same.
            with suppress(RuntimeError):
                attempt.reschedule(now)

    def describe(self) -> dict[str, Any]:
        """As `GET /workers` shows it."""
        info = self.info or WorkerInfo()
        return {
            "id": self.id,
            "url": self.url,
            "model_id": public_name(info.model_name or info.model_path),
            "worker_type": "regular",
            "connection_mode": "http",
            "is_healthy": self.phase is Phase.READY,
            "phase": self.phase.value,
            "circuit_breaker": self.breaker.state.value,
            "load": self.active,
            "dp_size": info.ranks,
            "ranks": list(self.ranks),
            "labels": self.labels,
            "version": info.version,
            "last_error": self.last_error,
        }
