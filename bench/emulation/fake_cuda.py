"""A device without a device: queues nothing, computes at once, and proves that any order a GPU may take is as good.

Every stream has a vector clock; recording an event copies it, waiting for one joins it. Two accesses to the same bytes
of which one writes have to be ordered by those clocks. Where all are, every order that the streams and events allow
gives the same contents, so doing the work at once, in the order of the calls, shows what any GPU would show.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from asyncep_sgl.errors import GatherError
from asyncep_sgl.experts.gather.device import Copy


class RaceError(AssertionError):
    """Two accesses that no event orders."""


@dataclass(frozen=True, eq=False)
class FakeEvent:
    clock: dict[int, int]
    at: float


@dataclass(eq=False)
class FakeStream:
    number: int
    clock: dict[int, int] = field(default_factory=dict)

    def tick(self) -> dict[int, int]:
        self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return dict(self.clock)


@dataclass
class _Access:
    begin: int
    end: int
    write: bool
    stream: int
    tick: int
    what: str


@dataclass
class FakeDevice:
    """A `device.Device` on the host's memory.

    Attributes:
        failures: numbers of `copy` calls, from 0, that are refused half way.
        calls: (call, stream, ...) in order.
        synchronized: how often the host waited.
    """

    failures: frozenset[int] = frozenset()
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    synchronized: int = 0
    pinned: set[int] = field(default_factory=set)
    _streams: list[FakeStream] = field(default_factory=list)
    _current: list[FakeStream] = field(default_factory=list)
    _accesses: list[_Access] = field(default_factory=list)
    _copies: int = 0

    def __post_init__(self) -> None:
        self._current.append(self.new_stream())

    def current_stream(self) -> FakeStream:
        return self._current[-1]

    def new_stream(self) -> FakeStream:
        self._streams.append(FakeStream(len(self._streams)))
        return self._streams[-1]

    def record(self, stream: FakeStream) -> FakeEvent:
        self.calls.append(("record", stream.number))
        return FakeEvent(dict(stream.clock), time.perf_counter())

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        self.calls.append(("wait", stream.number))
        for number, tick in event.clock.items():
            stream.clock[number] = max(stream.clock.get(number, 0), tick)

    def prepare(self, copies: Sequence[Copy]) -> list[Copy]:
        ranges = sorted((c.target.data_ptr(), c.target.data_ptr() + c.target.nbytes) for c in copies)
        for (_, end), (begin, _) in itertools.pairwise(ranges):
            assert end <= begin, "targets of one batch overlap"
        assert all(copy.target.nbytes == copy.source.nbytes for copy in copies)
        return list(copies)

    def copy(self, stream: FakeStream, prepared: list[Copy]) -> None:
        number, self._copies = self._copies, self._copies + 1
        refused = number in self.failures
        for copy in prepared[: len(prepared) // 2] if refused else prepared:
            self.touch(stream, copy.source, write=False, what="copy reads")
            self.touch(stream, copy.target, write=True, what="copy writes")
            copy.target.copy_(copy.source)
            self.calls.append(("copy", stream.number, copy.target.nbytes))
        if refused:
            raise GatherError("this copy was refused")

    @contextlib.contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def seconds(self, earlier: FakeEvent, later: FakeEvent) -> float:
        return later.at - earlier.at

    def synchronize(self, stream: FakeStream) -> None:
        self.synchronized += 1

    def pin(self, memory: torch.Tensor) -> None:
        self.pinned.add(memory.data_ptr())

    def touch(self, stream: FakeStream, memory: torch.Tensor, *, write: bool, what: str) -> None:
        """An access by whatever is queued on ``stream`` now.

        Raises:
            RaceError: an earlier one to the same bytes may still be under way.
        """
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        for other in self._accesses:
            ordered = other.stream == stream.number or stream.clock.get(other.stream, 0) >= other.tick
            if other.begin < end and begin < other.end and (write or other.write) and not ordered:
                raise RaceError(f"{what} on stream {stream.number}, {other.what} on stream {other.stream}")
        clock = stream.tick()
        if write:
            # Every access to these bytes is ordered before this one: what follows it follows them.
            self._accesses = [a for a in self._accesses if not (begin <= a.begin and a.end <= end)]
        self._accesses.append(_Access(begin, end, write, stream.number, clock[stream.number], what))
