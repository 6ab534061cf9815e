"""Two emulated hosts that keep half of the experts each: the link between them cut, an exporter killed or stopped."""

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


def by_ids(asked: list[Question]) -> list[Question]:
    """Those that a server without a tokenizer takes."""
    return [question for question in asked if "input_ids" in question.body]


async def cases(model: Path, clients: int, seconds: float, seed: int) -> AsyncIterator[Result]:
    """Yields each case's result.

    Raises:
        NoNamespacesError: this machine cannot emulate hosts.
    """
    with two_hosts("200mbit") as hosts, group(hosts, model, *_FLAGS) as servers:
        one, other = servers
        asked = by_ids(questions(30, seed))
        expected = await answers(one.url, asked, None)
        load = Load(asked, expected, clients, before=20, after=40)

        def ended() -> bool:
            return one.process.poll() is not None or other.process.poll() is not None

        yield await disturbed(
            f"hosts: the link is cut for {seconds:g} s",
            one.url,
            lambda: _cut(hosts, seconds),
            load,
            lambda: _healthy(one) and _healthy(other),
            ended,
            key=None,
        )
        faults: tuple[tuple[str, Callable[[int], Fault]], ...] = (
            ("hosts: kill -9 the other host's exporter", lambda pid: signalled(pid, signal.SIGKILL)),
            (f"hosts: SIGSTOP the other host's exporter for {seconds:g} s", lambda pid: stopped(pid, seconds)),
        )
        for name, fault in faults:
            exporter = _exporter(other)
            if exporter is None:
                continue
            yield await disturbed(
                name,
                one.url,
                fault(exporter.pid),
                load,
                lambda: _healthy(one) and _exporter(other) is not None,
                ended,
                key=None,
            )
        rank = other.scheduler()
        yield await disturbed(
            "hosts: kill -9 the other host's rank",
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


def _exporter(server: GroupServer) -> psutil.Process | None:
    """The process through which the other host reads; the server's own process runs under `ip netns exec`."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if role(process, server.process.pid) == "exporter":
                return process
        except psutil.Error:
            continue
    return None
