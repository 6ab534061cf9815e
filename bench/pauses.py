"""When the whole machine stood still, as a virtual one does while its host gives it no time.

Latencies of such moments say nothing about a server. A process of its own sleeps for a moment again and again; where
that took far longer than asked, nothing ran, however busy the processors were.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

_SLEEP_SECONDS = 0.01
# A busy processor lets a process that has slept run within a few hundredths.
LEAST_SECONDS = 0.15


@dataclass
class Pauses:
    """Filled when the watch ends: begin and end of each pause, by `time.monotonic`."""

    found: list[tuple[float, float]] = field(default_factory=list)

    def overlap(self, begin: float, end: float) -> bool:
        """Whether the machine stood still at any time between two moments."""
        return any(begin < until and since < end for since, until in self.found)

    def seconds(self) -> float:
        """In all."""
        return sum(until - since for since, until in self.found)


@contextlib.contextmanager
def watched() -> Iterator[Pauses]:
    """Watches the machine while the block runs."""
    pauses = Pauses()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_watch, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    ours.recv()  # it watches
    try:
        yield pauses
    finally:
        ours.send(None)
        pauses.found = ours.recv()
        process.join()


def _watch(line: Connection) -> None:
    with contextlib.suppress(PermissionError):
        os.nice(-10)
    found = []
    line.send(None)
    last = time.monotonic()
    while not line.poll(_SLEEP_SECONDS):
        now = time.monotonic()
        if now - last > LEAST_SECONDS:
            found.append((last, now))
        last = now
    line.send(found)
