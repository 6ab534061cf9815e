"""What is known of the HTTP request being served, for the code that it meets on its way through the front."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType

from asyncep_router.keys import NOBODY, Caller


@dataclass
class Passage:
    """One HTTP request.

    Attributes:
        sent: something of it has gone to a rank. Until then, whatever goes wrong is the request's own fault.
        values: log-probabilities that its answer will have, as far as is known.
    """

    sent: bool = False
    values: int = 0


passage: ContextVar[Passage | None] = ContextVar("asyncep_passage", default=None)
"""The HTTP request being served; None outside one."""

endpoint: ContextVar[str] = ContextVar("asyncep_endpoint", default="")
"""The path of the HTTP request being served; empty outside one."""

asked: ContextVar[tuple[ReferenceType[Any] | None, int]] = ContextVar("asyncep_asked", default=(None, 0))
"""What SGLang makes requests of just now, a list perhaps, and the number of its first prompt in the client's list.

Contexts are copied to tasks and timers that outlive the request, so it is not kept alive by them."""

caller: ContextVar[Caller] = ContextVar("asyncep_caller", default=NOBODY)
"""Who sent the request being served. A batch's requests are served in its owner's name."""

in_batch: ContextVar[bool] = ContextVar("asyncep_in_batch", default=False)
"""Whether the request being served belongs to a batch: it is served in the context of the task that sent it."""
