"""One server on two ranks: each of its processes killed, stopped, and short of a core."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from hostile.disturb import Load, Result, core_taken, disturbed, note_end, signalled, stopped
from hostile.servers import PASSING, Place, Running, serve

ROLES = ("rank 0", "rank 1", "controller", "detokenizer", "front", "launcher", "template")


class OneServer:
    """The server of these cases; a case that ended it leaves the next one to start it again."""

    def __init__(self, here: Place, model: Path) -> None:
        self._here, self._model = here, model
        self.server: Running | None = None
        self.last_start_s = 0.0

    def up(self) -> Running:
        if self.server is None or self.server.process.poll() is not None:
            began = time.monotonic()
            self.server = serve(self._here, self._model, "--asyncep-batch-dir", str(self._here.folder / "batches"))
            self.server.wait_ready(word=" ready in ")
            self.last_start_s = round(time.monotonic() - began, 2)
        return self.server

    def stop(self) -> list[str]:
        if self.server is None:
            return []
        left = self.server.stop()
        return [str(process.pid) for process in left]


def whole(server: Running, roles: Iterable[str]) -> bool:
    """Whether these processes are there and every rank takes requests."""
    try:
        return set(roles) <= set(server.roles()) and all(server.get("/router/state", 5.0)["alive"])
    except (OSError, ValueError):
        return False


def staying(roles: Iterable[str]) -> set[str]:
    """Without those that come and go by themselves."""
    return set(roles) - set(PASSING)


async def kills(one: OneServer, here: Place, load: Load, roles: tuple[str, ...] = ROLES) -> AsyncIterator[Result]:
    """kill -9 of each process in turn."""
    for role in roles:
        server = one.up()
        there = server.roles()
        if role not in there:
            continue
        wanted = staying(there)
        result = await disturbed(
            f"kill -9 {role}",
            server.url,
            signalled(there[role].pid, signal.SIGKILL),
            load,
            lambda server=server, wanted=wanted: whole(server, wanted),  # type: ignore[misc]
            lambda server=server: server.process.poll() is not None,  # type: ignore[misc]
        )
        if result.ended_s is not None:
            note_end(result, server, here)
            one.up()
            # What a launcher that was killed could not remove, the next start does.
            result.left_on_disk = here.left_on_disk()
            result.serves_again_s = one.last_start_s
        yield result


async def deaths_in_a_row(one: OneServer, load: Load, count: int) -> AsyncIterator[Result]:
    """The same rank killed again and again; what its return takes each time is in ``more``."""
    server = one.up()
    merged = Result(f"kill -9 rank 0, {count} times in a row")
    merged.more["whole_again_s"] = []
    for _ in range(count):
        there = server.roles()
        if "rank 0" not in there:
            merged.ended_s = merged.ended_s or 0.0
            break
        wanted = staying(there)
        result = await disturbed(
            merged.case,
            server.url,
            signalled(there["rank 0"].pid, signal.SIGKILL),
            load,
            lambda: whole(server, wanted),  # noqa: B023 - called before the next turn
            lambda: server.process.poll() is not None,
        )
        merged.more["whole_again_s"].append(result.whole_again_s)
        for name in ("right", "wrong", "refused", "lost", "cut_off"):
            setattr(merged, name, getattr(merged, name) + getattr(result, name))
        merged.longest_s = max(merged.longest_s, result.longest_s)
        merged.faults += result.faults
        merged.refusals |= result.refusals
        merged.ended_s = result.ended_s
        if result.ended_s is not None:
            break
    times = [seconds for seconds in merged.more["whole_again_s"] if seconds is not None]
    merged.whole_again_s = max(times, default=None)
    merged.serves_again_s = merged.whole_again_s
    yield merged


async def stops(
    one: OneServer, here: Place, load: Load, seconds: float, roles: tuple[str, ...] = ROLES
) -> AsyncIterator[Result]:
    """SIGSTOP of each process in turn for so long, then SIGCONT."""
    for role in roles:
        server = one.up()
        there = server.roles()
        if role not in there:
            continue
        wanted = staying(there)
        result = await disturbed(
            f"SIGSTOP {role} for {seconds:g} s",
            server.url,
            stopped(there[role].pid, seconds),
            load,
            lambda server=server, wanted=wanted: whole(server, wanted),  # type: ignore[misc]
            lambda server=server: server.process.poll() is not None,  # type: ignore[misc]
        )
        if result.ended_s is not None:
            note_end(result, server, here)
        yield result


async def slow_core(one: OneServer, load: Load, seconds: float) -> AsyncIterator[Result]:
    """One core is taken away for so long."""
    server = one.up()
    wanted = staying(server.roles())
    core = sorted(os.sched_getaffinity(0))[-1]
    yield await disturbed(
        f"a core taken away for {seconds:g} s",
        server.url,
        core_taken(core, seconds),
        load,
        lambda: whole(server, wanted),
        lambda: server.process.poll() is not None,
    )


async def ordered_end(one: OneServer, here: Place, load: Load) -> AsyncIterator[Result]:
    """SIGTERM under load: what is in flight is answered, what comes later is refused, nothing is left."""
    server = one.up()
    result = await disturbed(
        "SIGTERM launcher",
        server.url,
        signalled(server.process.pid, signal.SIGTERM),
        load,
        lambda: False,
        lambda: server.process.poll() is not None,
    )
    if result.ended_s is not None:
        note_end(result, server, here)
    result.more["status"] = server.process.poll()
    yield result
