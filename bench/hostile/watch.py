"""Memory and descriptors of each process, sampled while a suite runs, and what they say."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil


@dataclass(frozen=True)
class Sample:
    """A process at one moment. Bytes: resident, private to it, and with each shared page divided by who share it.

    ``own`` is the last without pages of files: those are mostly libraries, of which a process's part grows when another
    one on the machine that has them too ends.
    """

    seconds: float
    pid: int
    rss: int
    uss: int
    pss: int
    own: int
    descriptors: int


def sampled(roles: Mapping[str, psutil.Process], began: float) -> dict[str, Sample]:
    """Each process now; one that has just ended is left out."""
    found = {}
    for name, process in roles.items():
        with contextlib.suppress(psutil.Error, OSError):
            memory, seconds = process.memory_full_info(), round(time.monotonic() - began, 1)
            own = own_bytes(Path(f"/proc/{process.pid}/smaps_rollup").read_text())
            found[name] = Sample(seconds, process.pid, memory.rss, memory.uss, memory.pss, own, process.num_fds())
    return found


def own_bytes(rollup: str) -> int:
    """Of a process's ``smaps_rollup``: anonymous and shared memory, each page divided by who share it. Pure."""
    fields = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
    return sum(int(fields[name].split()[0]) << 10 for name in ("Pss_Anon", "Pss_Shmem"))


def held(process: psutil.Process) -> Counter[str]:
    """What a process's descriptors are: files by path, TCP connections by state, others by kind; how many of each."""
    found = Counter[str]()
    with contextlib.suppress(psutil.Error, OSError):
        found.update(f"tcp {one.status}" for one in process.net_connections("tcp"))
        folder = Path(f"/proc/{process.pid}/fd")
        for entry in folder.iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(entry)
                found[target.partition(":[")[0]] += 1
    return found


class Beside:
    """Something that runs beside what else the loop does."""

    _task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        raise NotImplementedError


class Watch(Beside):
    """Samples every so many seconds beside what else the loop does."""

    def __init__(self, roles: Callable[[], Mapping[str, psutil.Process]], every: float) -> None:
        self.series: dict[str, list[Sample]] = {}
        self._roles, self._every = roles, every
        self._began = time.monotonic()

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        await self.take()

    def seconds(self) -> float:
        """On the clock of the samples."""
        return time.monotonic() - self._began

    async def take(self) -> None:
        """One more sample of each process."""
        # Reading a large process's pages takes tens of milliseconds, which the clients' loop should not wait.
        for name, sample in (await asyncio.to_thread(lambda: sampled(self._roles(), self._began))).items():
            self.series.setdefault(name, []).append(sample)

    async def _run(self) -> None:
        while True:
            await self.take()
            await asyncio.sleep(self._every)

    def largest_growth(self) -> tuple[int, str]:
        """Most bytes by which a process ever stood above its first sample, and whose."""
        growths = [
            (max(sample.own for sample in series) - series[0].own, name)
            for name, series in self.series.items()
            if series
        ]
        return max(growths, default=(0, "none"))

    def raw(self) -> dict[str, list[dict[str, Any]]]:
        return {name: [asdict(sample) for sample in series] for name, series in self.series.items()}


class Lateness(Beside):
    """How late the clients' own event loop was: what they measure has that in it."""

    _EVERY, _NOTED = 0.05, 0.5

    def __init__(self) -> None:
        self.longest = 0.0
        self.stops: list[tuple[float, float]] = []
        self._began = time.monotonic()

    async def _run(self) -> None:
        while True:
            at = time.monotonic()
            await asyncio.sleep(self._EVERY)
            late = time.monotonic() - at - self._EVERY
            self.longest = max(self.longest, late)
            if late > self._NOTED:
                self.stops.append((round(at - self._began, 1), round(late, 2)))


def growth(series: Sequence[Sample], settled: float, until: float = float("inf"), share: float = 0.15) -> float | None:
    """Memory at the end over memory once settled, as a ratio less one; medians of stretches, since samples jump.

    Args:
        settled: seconds after which a process is to have all that it needs.
        until: seconds up to which there was load; an idle process is no measure of one that works.
        share: of the time after, at its beginning and at its end, that is compared.
    """
    after = [sample for sample in series if settled <= sample.seconds <= until]
    if len(after) < 4:
        return None
    count = max(2, int(len(after) * share))
    first = statistics.median(sample.own for sample in after[:count])
    last = statistics.median(sample.own for sample in after[-count:])
    return last / first - 1 if first else None
