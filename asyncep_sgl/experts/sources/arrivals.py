"""A thread that looks after reads under way, so that the thread that computes finds them done and checked.

Looking for the end of a read and comparing digests take a few milliseconds a layer. On the computing thread they would
be exposed wait; here they are hidden with the rest of the gather.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from queue import SimpleQueue

from asyncep_sgl.experts.sources.remote import PeerLostError, Read

Wrong = list[tuple[str, int, int]]
"""(tensor, expert, node) of what is not as its owner wrote it."""

# Between two looks: while somebody waits, and while nobody does.
_HURRIED_SECONDS = 0.0003
_LOOK_SECONDS = 0.001
# Of what the last gather took, so much is slept through before the first look.
_SLEPT_THROUGH = 0.7


@dataclass(frozen=True)
class Arrived:
    """How a round of reads ended.

    Attributes:
        seconds: how long the link was busy with it: from the request, or from the end of the round before where that
            was still coming, until the last byte was there.
        broken: hosts whose read broke, and over which connection.
        wrong: what did not come as its owner wrote it.
    """

    seconds: float
    broken: Mapping[int, int]
    wrong: Wrong


@dataclass
class Round:
    """Reads of one layer into one slot, by host, and the check of what they brought."""

    reads: Mapping[int, Read]
    check: Callable[[], Wrong]
    wake: threading.Event
    started: float
    ended: Future[Arrived] = field(default_factory=Future)
    hurried: bool = False
    stopped: bool = False

    def wait(self, seconds: float) -> Arrived:
        """How it ended.

        Raises:
            TimeoutError: it has not, after so many seconds.
        """
        self.hurried = True
        self.wake.set()
        return self.ended.result(seconds)

    def over(self) -> bool:
        """Whether `stop` would return at once."""
        return self.ended.done() and all(read.over() for read in self.reads.values())

    def stop(self) -> None:
        """Returns once neither the reads nor the thread touch the slot any more."""
        self.stopped = True
        self.wake.set()
        with contextlib.suppress(CancelledError):
            self.ended.result()
        for read in self.reads.values():
            read.abandon()


class Arrivals:
    """The thread, for rounds of one rank."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wake = threading.Event()
        self._rounds: SimpleQueue[Round] = SimpleQueue()
        self._expected = 0.0
        self._last_end = float("-inf")
        # Daemon: a rank that ends must not wait for a host that is away.
        threading.Thread(target=self._run, name="asyncep-arrivals", daemon=True).start()

    def watch(self, reads: Mapping[int, Read], check: Callable[[], Wrong]) -> Round:
        """Looks after ``reads``, just asked for; ``check`` is called by the thread once all are there."""
        found = Round(dict(reads), check, self._wake, self._clock())
        self._rounds.put(found)
        return found

    def _run(self) -> None:
        active: list[Round] = []
        while True:
            while not active or not self._rounds.empty():
                active.append(self._rounds.get())
            self._wake.clear()
            active = [entry for entry in active if not self._settle(entry)]
            if active:
                self._wake.wait(self._pause(active))

    def _pause(self, active: list[Round]) -> float:
        if any(entry.hurried for entry in active):
            return _HURRIED_SECONDS
        due = min(self._busy_from(entry) for entry in active) + _SLEPT_THROUGH * self._expected
        return max(_LOOK_SECONDS, due - self._clock())

    def _busy_from(self, entry: Round) -> float:
        return max(entry.started, self._last_end)

    def _settle(self, entry: Round) -> bool:
        """Whether the round has ended; whoever waits for it is told."""
        try:
            arrived = self._look(entry)
        except BaseException as error:
            entry.ended.set_exception(error)
            return True
        if arrived is None:
            return False
        entry.ended.set_result(arrived)
        return True

    def _look(self, entry: Round) -> Arrived | None:
        if entry.stopped:
            raise CancelledError
        if broken := _broken(entry.reads):
            return Arrived(0.0, broken, [])
        if not all(read.done() for read in entry.reads.values()):
            return None
        now = self._clock()
        self._expected, self._last_end = now - self._busy_from(entry), now
        return Arrived(self._expected, {}, entry.check())


def _broken(reads: Mapping[int, Read]) -> dict[int, int]:
    found = {}
    for node, read in reads.items():
        try:
            read.done()
        except PeerLostError:
            found[node] = read.connection
    return found
