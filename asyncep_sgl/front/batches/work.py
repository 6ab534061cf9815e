"""A batch that is worked on, as the runner knows it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from asyncep_router.keys import Caller
from asyncep_sgl.front.batches.bounds import Promise
from asyncep_sgl.front.batches.lines import Problem
from asyncep_sgl.front.batches.records import BatchRecord


@dataclass
class Work:
    """A batch that is worked on.

    Attributes:
        caller: whose it is, with the rate and the quota that the owner's key has now.
        foreign: it was created for another model than the one that is served.
        reading: its input is noted as being read, so that an end of the server counts.
        end: no further request: cancelled, or its window has ended.
        wake: looked at by whoever pauses.
        going: clear while answers cannot be kept.
        waits: why it does not go on at the moment.
        problem: why it cannot go on at all.
        problems: why it was not begun.
    """

    id: str
    caller: Caller
    foreign: bool = False
    reading: bool = False
    end: asyncio.Event = field(default_factory=asyncio.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    going: asyncio.Event = field(default_factory=asyncio.Event)
    waits: str | None = None
    problem: Problem | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def owner(self) -> str:
        """The name of the caller whose it is."""
        return self.caller.name

    @property
    def stopped(self) -> bool:
        """Whether no further request is to be sent."""
        return self.end.is_set() or self.problem is not None

    async def pause(self, seconds: float) -> None:
        """Returns after so many seconds, or earlier where something has changed."""
        self.wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.wake.wait(), seconds)


@dataclass
class Answers:
    """A batch's answers so far, for what it will still write."""

    batch: BatchRecord
    number: int
    size: int

    def promise(self) -> Promise:
        """What it will still write."""
        batch = self.batch
        return Promise.of(batch.owner, batch.estimate, batch.total, self.number, self.size)
