"""The ways to serve the same ranks that bench/router.py compares, each as a context that yields a URL.

An engine side is one server with two ranks. A router side is a router process in front of two servers with one rank
each, one per core, which live for a whole round while routers come and go.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from peer_start import ADMIN_KEY, flush_cache

from asyncep.local_server import local_server
from asyncep_router.http.options import WORKER_ADMIN_KEY_VARIABLE
from asyncep_sgl.process.ports import free_port

PAGE = 16
RANKS = 2
COMMON = ("--skip-tokenizer-init", "--log-level", "error", "--page-size", str(PAGE))
START_SECONDS = 120.0
IDLE_LOOKS = 4
# What a process is called, in the order in which names are looked for.
TITLES = (
    ("_router.launch_router", "http router"),
    ("asyncep_sgl.front.server", "front"),
    ("controller", "router"),
    ("detokenizer", "detokenizer"),
    ("scheduler", "rank"),
)


@dataclass(frozen=True)
class Side:
    """One of the compared. `flags`: of the engine, or of the router. `router`: None, "ours" or "rust"."""

    name: str
    flags: tuple[str, ...] = ()
    router: str | None = None


SIDES = (
    Side("asyncep"),
    Side("sglang round_robin (default)", ("--load-balance-method", "round_robin")),
    Side("sglang total_tokens", ("--load-balance-method", "total_tokens")),
    Side("sglang total_requests", ("--load-balance-method", "total_requests")),
    Side("sglang_router cache_aware", ("--policy", "cache_aware"), "rust"),
    Side("sglang_router power_of_two", ("--policy", "power_of_two"), "rust"),
    Side("sglang_router round_robin", ("--policy", "round_robin"), "rust"),
    Side("asyncep http", (), "ours"),
)


@contextlib.contextmanager
def engine(model: str, side: Side) -> Iterator[str]:
    """One server with two ranks; yields its URL."""
    with local_server(model, ["--dp-size", str(RANKS), *COMMON, *side.flags]) as url:
        yield url


@dataclass
class Workers:
    """Two servers with one rank each. Each says in its answers, as its weights' version, which of them it is."""

    model: str
    urls: list[str] = field(default_factory=list)
    _ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Workers:
        cores = sorted(os.sched_getaffinity(0))
        found: dict[int, str] = {}
        errors: list[BaseException] = []
        lock = threading.Lock()

        def start(rank: int) -> None:
            # Of this thread alone; what it starts inherits it.
            os.sched_setaffinity(0, {cores[rank % len(cores)]})
            # The router in front is what is compared: none of our own in the server.
            alone = ["--dp-size", "1", "--load-balance-method", "round_robin"]
            flags = [*alone, "--weight-version", f"rank {rank}", *COMMON]
            server = local_server(self.model, flags)
            try:
                url = server.__enter__()
            except BaseException as error:
                errors.append(error)
                return
            with lock:
                self._ends.push(server.__exit__)
                found[rank] = url

        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            self._ends.close()
            raise errors[0]
        self.urls = [found[rank] for rank in range(RANKS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def flush(self) -> None:
        """Empties the prefix caches."""
        for url in self.urls:
            flush_cache(url)


def peer_python(directory: Path) -> Path | None:
    """The interpreter of an environment that has `sglang_router`; None if it is not there."""
    python = directory / "bin" / "python"
    if not python.exists():
        return None
    probe = subprocess.run([python, "-c", "import sglang_router.launch_router"], capture_output=True, check=False)
    return python if probe.returncode == 0 else None


def peer_version(python: Path) -> str:
    """The version of `sglang_router` in that environment."""
    code = "from importlib.metadata import version; print(version('sglang-router'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def router(side: Side, urls: Sequence[str], peer: Path | None) -> Iterator[str]:
    """A router in front of servers, both flushed and known to it; yields its URL.

    Raises:
        RuntimeError: it did not take requests; carries what it printed last.
    """
    port, metrics = free_port(), free_port()
    python = str(peer) if side.router == "rust" else sys.executable
    module = "sglang_router" if side.router == "rust" else "asyncep_router"
    command = [python, "-m", f"{module}.launch_router", "--worker-urls", *urls, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--prometheus-port", str(metrics), *side.flags]
    command += ["--worker-startup-check-interval", "1", "--log-level", "warn"]
    with tempfile.TemporaryFile() as log:
        keys = {WORKER_ADMIN_KEY_VARIABLE: ADMIN_KEY}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **keys})
        try:
            _wait_ready(process, f"http://127.0.0.1:{port}", len(urls), log.fileno())
            _wait_idle(process.pid)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def role(process: psutil.Process) -> str:
    """What a process of a server is for; "other" is the launcher and what serves Python's multiprocessing."""
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return "other"
    return next((role for title, role in TITLES if title in command), "other")


def processor_seconds_by_role(pid: int) -> dict[str, float]:
    """Processor time of everything a process started, of those that live: roles have all their processes together."""
    found: dict[str, float] = {}
    for each in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            name = role(each)
            found[name] = found.get(name, 0.0) + times.user + times.system
    return found


def processor_seconds(pid: int, *, itself: bool = True) -> float:
    """Processor time of a process and everything it started, of those that live."""
    process = psutil.Process(pid)
    total = 0.0
    for each in [*([process] if itself else []), *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system
    return total


def _wait_idle(pid: int) -> None:
    """Until a process has ended what it still does after it is ready: loading a tokenizer would be the ranks' loss."""
    used, quiet = processor_seconds(pid), 0
    deadline = time.monotonic() + START_SECONDS
    while quiet < IDLE_LOOKS and time.monotonic() < deadline:
        time.sleep(0.25)
        now = processor_seconds(pid)
        quiet = quiet + 1 if now - used < 0.02 else 0
        used = now


def _wait_ready(process: subprocess.Popen[bytes], url: str, workers: int, log: int) -> None:
    """Until the router has so many workers: a router that knows one of two would be measured wrongly."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            found = httpx.get(f"{url}/workers", timeout=10).json()["workers"]
            healthy = sum(bool(worker["is_healthy"]) for worker in found)
            if healthy == workers and httpx.get(f"{url}/readiness", timeout=10).status_code == 200:
                return
        time.sleep(0.1)
    printed = Path(f"/proc/self/fd/{log}").read_text(errors="replace")
    raise RuntimeError(f"the router did not become ready (status {process.poll()}):\n{printed[-2000:]}")
