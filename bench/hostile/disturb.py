"""A fault under the load of many clients: what they got, when it served again, and what was left of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from hostile.honest import Clients, Question
from hostile.servers import KEY, Place, Running

# How the end of a server looks to a client: refused by the machine, not lost. A request that waits without end is.
_ENDED = ("ConnectionRefusedError", "ConnectionResetError", "BrokenPipeError", "closed", "closed in the middle")
_STEP = 0.05
_AGAIN_SECONDS = 90.0


@dataclass
class Load:
    """Clients and the questions whose answers they know.

    Attributes:
        before, after: right answers before the fault and after it is over; the load is surely there then.
    """

    asked: Sequence[Question]
    expected: Sequence[Sequence[float]]
    clients: int
    before: int
    after: int


@dataclass
class Result:
    """What a case came to. Seconds are from the fault on.

    Attributes:
        lost: unanswered, cut off without the server's end, or answered with a failure and no reason.
        cut_off: connections closed or refused by the end of the server.
        serves_again_s: until a request that began after the fault was answered right.
        whole_again_s: until every process was there again.
        ended_s: until the server had ended, where it did.
        longest_s: the longest that an answer took.
    """

    case: str
    right: int = 0
    wrong: int = 0
    refused: int = 0
    lost: int = 0
    cut_off: int = 0
    serves_again_s: float | None = None
    whole_again_s: float | None = None
    ended_s: float | None = None
    reason: str = ""
    longest_s: float = 0.0
    left_running: list[str] = field(default_factory=list)
    left_on_disk: list[str] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def count(self, clients: Clients) -> None:
        """Takes over what the clients counted."""
        tally = clients.tally
        gone = sum(count for error, count in tally.losses.items() if error in _ENDED) if self.ended_s is not None else 0
        self.right += tally.counts["right"]
        self.wrong += tally.counts["wrong"]
        self.refused += tally.counts["refused"]
        self.lost += tally.counts["lost"] - gone
        self.cut_off += gone
        self.longest_s = round(max([self.longest_s, *tally.seconds]), 2)
        self.refusals |= dict(tally.refusals.most_common(5))
        self.faults += [fault for fault in tally.faults if not gone or not fault.startswith("lost: ")][:5]

    def record(self) -> dict[str, Any]:
        return asdict(self)


Fault = Callable[[], Coroutine[Any, Any, None]]


async def disturbed(
    name: str,
    url: str,
    fault: Fault,
    load: Load,
    whole: Callable[[], bool],
    ended: Callable[[], bool],
    *,
    key: str | None = KEY,
) -> Result:
    """Clients at work, ``fault`` among them, and clients at work again, or the end of what served them.

    Args:
        whole: whether every process is there (again).
        ended: whether the server has ended, by itself.
    """
    result = Result(name)
    async with Clients(url, load.asked, load.expected, key, load.clients) as clients:
        with contextlib.suppress(TimeoutError):
            await clients.answered(load.before)
        began = time.monotonic()
        fault_done = asyncio.create_task(fault())
        while time.monotonic() < began + _AGAIN_SECONDS:
            if await asyncio.to_thread(ended):
                result.ended_s = round(time.monotonic() - began, 2)
                break
            if fault_done.done() and result.whole_again_s is None and await asyncio.to_thread(whole):
                result.whole_again_s = round(time.monotonic() - began, 2)
            if result.whole_again_s is not None and (first := _first_after(clients, began)) is not None:
                result.serves_again_s = round(first - began, 2)
                break
            await asyncio.sleep(_STEP)
        await fault_done
        if result.ended_s is None:
            # What came of the fault may show later; the load goes on for a while.
            with contextlib.suppress(TimeoutError):
                await clients.answered(load.after, within=60.0)
        await clients.stop()
        result.count(clients)
    return result


def _first_after(clients: Clients, moment: float) -> float | None:
    tally = clients.tally
    ends = [began + took for began, took in zip(tally.began, tally.seconds, strict=True) if began >= moment]
    return min(ends, default=None)


def signalled(pid: int, how: signal.Signals) -> Fault:
    async def fault() -> None:
        os.kill(pid, how)

    return fault


def stopped(pid: int, seconds: float) -> Fault:
    """The process stands still for so long; one that was ended meanwhile stays so."""

    async def fault() -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    return fault


def core_taken(core: int, seconds: float) -> Fault:
    """Processes that compute on one core with a higher priority than the server's, as a busy neighbour does."""

    async def fault() -> None:
        spin = ["nice", "-n", "-10", "taskset", "-c", str(core), "sh", "-c", "while :; do :; done"]
        others = [await asyncio.create_subprocess_exec(*spin) for _ in range(2)]
        try:
            await asyncio.sleep(seconds)
        finally:
            for other in others:
                other.kill()
                await other.wait()

    return fault


def note_end(result: Result, server: Running, here: Place) -> None:
    """What a server that has ended left, and the reason it gave."""
    left = server.leave()
    result.left_running = [f"{process.pid} {_name(process)}" for process in left]
    result.left_on_disk = here.left_on_disk()
    printed = server.log.read_text(errors="replace").rpartition(" ready in ")[2]
    lines = [line for line in printed.splitlines()[1:] if line.startswith("asyncep")]
    result.reason = lines[-1][:300] if lines else ""


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return str(process.name())
    return "?"
