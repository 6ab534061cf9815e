"""Calls that wait at a worker. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from asyncep_sgl.experts.calls.messages import Call

Payload = TypeVar("Payload")

# Rows that are computed together, unless a single call has more: beyond it merging gains nothing.
MOST_ROWS = 16_384


@dataclass(frozen=True)
class Waiting(Generic[Payload]):
    """A call with what came with it.

    Attributes:
        caller: whose; numbers are unique within one caller.
        since: when it came, in seconds of the queue's owner.
    """

    caller: bytes
    call: Call
    payload: Payload
    since: float

    @property
    def rows(self) -> int:
        """How many it has."""
        return sum(self.call.counts)


@dataclass
class CallQueue(Generic[Payload]):
    """First come, first served; calls for the layer whose turn it is are computed together, whoever they come from.

    Attributes:
        dropped: calls that their callers had stopped waiting for.
    """

    most_rows: int = MOST_ROWS
    dropped: int = 0
    _waiting: deque[Waiting[Payload]] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting[Payload]]:
        return iter(self._waiting)

    def add(self, entry: Waiting[Payload]) -> None:
        """A call has come. Earlier ones of the same caller that it says nobody waits for are dropped."""
        kept = [w for w in self._waiting if w.caller != entry.caller or w.call.number >= entry.call.oldest]
        self.dropped += len(self._waiting) - len(kept)
        self._waiting = deque([*kept, entry])

    def take(self) -> list[Waiting[Payload]]:
        """The oldest call, and as many others for its layer as fit into `most_rows`; in the order they came."""
        if not self._waiting:
            return []
        layer, rows = self._waiting[0].call.layer, 0
        taken: list[Waiting[Payload]] = []
        left: deque[Waiting[Payload]] = deque()
        for entry in self._waiting:
            if entry.call.layer == layer and (not taken or rows + entry.rows <= self.most_rows):
                taken.append(entry)
                rows += entry.rows
            else:
                left.append(entry)
        self._waiting = left
        return taken
