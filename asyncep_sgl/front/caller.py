"""Who sent the request that is being served, for everything that is called on its way."""

from __future__ import annotations

from contextvars import ContextVar

from asyncep_router.keys import NOBODY, Caller

caller: ContextVar[Caller] = ContextVar("asyncep_caller", default=NOBODY)
"""The caller of the request being served. A batch's requests are served in its owner's name."""
