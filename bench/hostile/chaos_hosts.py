"""Two emulated hosts that keep half of the experts each: the link cut, side processes and ranks killed or stopped."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
from emulation.group import GroupServer, group
from emulation.two_hosts import Hosts, two_hosts

from hostile.disturb import Fault, Load, Result, disturbed, signalled, stopped
from hostile.honest import Question, answers, questions
from hostile.servers import role

# Seconds for which a host waits for the other one before it says so to clients.
_PATIENCE = "5"
_FLAGS = ("--dtype", "float32", "--asyncep-patience-secs", _PATIENCE, "--log-level", "warning")


# What crosses the link: weights, whichever is faster, and what is drawn.
STRATEGIES = ("asyncep", "auto", "random:1")


def by_ids(asked: list[Question]) -> list[Question]:
    """Those that a server without a tokenizer takes."""
    return [question for question in asked if "input_ids" in question.body]


async def cases(model: Path, clients: int, seconds: float, seed: int) -> AsyncIterator[Result]:
    """Yields each case's result.

    Raises:
        NoNamespacesError: this machine cannot emulate hosts.
    """
    for strategy in STRATEGIES:
        async for result in _cases(model, clients, seconds, seed, strategy):
            yield result


async def _cases(model: Path, clients: int, seconds: float, seed: int, strategy: str) -> AsyncIterator[Result]:
    flags = (*_FLAGS, "--asyncep-strategy", strategy)
    with two_hosts("200mbit") as hosts, group(hosts, model, *flags) as servers:
        one, other = servers
        name = f"hosts, {strategy}"
        asked = by_ids(questions(30, seed))
        expected = await answers(one.url, asked, None)
        load = Load(asked, expected, clients, before=20, after=40)

        def ended() -> bool:
            return one.process.poll() is not None or other.process.poll() is not None

        yield await disturbed(
            f"{name}: the link is cut for {seconds:g} s",
            one.url,
            lambda: _cut(hosts, seconds),
            load,
            lambda: _healthy(one) and _healthy(other),
            ended,
            key=None,
        )
        faults: tuple[tuple[str, Callable[[int], Fault]], ...] = (
            ("kill -9", lambda pid: signalled(pid, signal.SIGKILL)),
            (f"for {seconds:g} s SIGSTOP", lambda pid: stopped(pid, seconds)),
        )
        for side in ("exporter",) if strategy == "asyncep" else ("exporter", "worker"):
            for how, fault in faults:
                process = _side_process(other, side)
                if process is None:
                    raise RuntimeError(f"{name}: the other host has no {side}")
                yield await disturbed(
                    f"{name}: {how} the other host's {side}",
                    one.url,
                    fault(process.pid),
                    load,
                    lambda side=side: _healthy(one) and _side_process(other, side) is not None,  # type: ignore[misc]
                    ended,
                    key=None,
                )
        rank = other.scheduler()
        yield await disturbed(
            f"{name}: kill -9 the other host's rank",
            one.url,
            signalled(rank.pid, signal.SIGKILL),
            load,
            lambda: _healthy(one),
            lambda: one.process.poll() is not None,
            key=None,
        )


async def _cut(hosts: Hosts, seconds: float) -> None:
    hosts.link(False)
    try:
        await asyncio.sleep(seconds)
    finally:
        hosts.link(True)


def _healthy(server: GroupServer) -> bool:
    try:
        with urlopen(f"{server.url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _side_process(server: GroupServer, side: str) -> psutil.Process | None:
    """The process that the other host reads or calls; the server's own process runs under `ip netns exec`."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if role(process, server.process.pid) == side:
                return process
        except psutil.Error:
            continue
    return None
