"""What is known of one HTTP request on its way through the front, for the code that it meets there."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


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
