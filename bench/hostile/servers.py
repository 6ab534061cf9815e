"""The servers and routers that are disturbed: started in a folder of their own, and nothing of them left afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from stock_end import end_with_parent

START_SECONDS = 300.0
END_SECONDS = 20.0
KEY, ADMIN_KEY = "hostile-user-5f2c", "hostile-admin-9d41"
# In fp32 an answer hardly depends on what else is in its batch.
_FLAGS = ("--dtype", "float32", "--log-level", "warning")
# Below the range from which the kernel gives clients their ports.
_PORTS = range(20000, 32000)
# Processes that come and go by themselves.
PASSING = ("template", "resource tracker")
_MARK = "ASYNCEP_HOSTILE_RUN"


def free_port() -> int:
    """A port below the ephemeral range that nobody listens on."""
    for port in random.sample(_PORTS, 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port from 20000 to 31999")


@dataclass
class Place:
    """Where a suite's servers live: their files, their temporary files, and a mark that their processes carry."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    shared_before: frozenset[str] = field(default_factory=lambda: frozenset(os.listdir("/dev/shm")))

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.folder / "t"), _MARK: self.mark}

    def left_running(self) -> list[psutil.Process]:
        """Processes that carry the mark. One that wrote its title over its environment is found by its parent's."""
        marked = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    marked.append(process)
        return marked

    def left_on_disk(self) -> list[str]:
        """Temporary files of runs, and names in shared memory that appeared meanwhile and that no process has open."""
        found = [str(path) for path in (self.folder / "t").glob("asyncep-run-*") if not _locked(path / "owner.lock")]
        new = set(os.listdir("/dev/shm")) - self.shared_before
        return found + sorted(new - _names_in_use() if new else ())


def _locked(path: Path) -> bool:
    """Whether a run that goes on holds the lock of its folder."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _names_in_use() -> set[str]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            maps = (process / "maps").read_text()
            found |= {line.rsplit("/dev/shm/", 1)[1] for line in maps.splitlines() if "/dev/shm/" in line}
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(descriptor)
                    if target.startswith("/dev/shm/"):
                        found.add(target.removeprefix("/dev/shm/"))
    return found


def end_in_order() -> None:
    """Makes SIGTERM what Ctrl-C is: what was started is ended first. A second one does not cut that short."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """A folder that goes at the end; whatever still runs with its mark is ended, and named in a warning."""
    # Short: Unix sockets' paths are.
    folder = Path(tempfile.mkdtemp(prefix="ah-", dir="/tmp"))
    (folder / "t").mkdir()
    here = Place(folder)
    try:
        yield here
    finally:
        for process in here.left_running():
            print(f"left running: {process.pid} {process.name()}", file=sys.stderr)
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Running:
    """A process that serves HTTP, and what it printed."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    key: str | None = KEY
    _seen: dict[int, psutil.Process] = field(default_factory=dict)

    def get(self, path: str, seconds: float = 10.0) -> Any:
        """A JSON answer, asked for as a user and, if that is refused, as the admin.

        Raises:
            OSError: none came in time, or it was no 200.
        """
        try:
            content = self._get(path, self.key, seconds)
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403) or self.key is None:
                raise
            content = self._get(path, ADMIN_KEY, seconds)
        return json.loads(content) if content.strip().startswith((b"{", b"[")) else content

    def _get(self, path: str, key: str | None, seconds: float) -> bytes:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, headers=headers), timeout=seconds
        ) as answer:
            content: bytes = answer.read()
            return content

    def answers(self, path: str = "/health", seconds: float = 5.0) -> bool:
        with contextlib.suppress(OSError, ValueError):
            self.get(path, seconds)
            return True
        return False

    def wait_ready(self, path: str = "/health", word: str = "") -> None:
        """Returns once ``path`` answers 200 and ``word`` has been printed.

        Raises:
            RuntimeError: it ended first, or takes too long; with the end of what it printed.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if word in self.log.read_text(errors="replace") and self.answers(path):
                self.processes()
                return
            time.sleep(0.1)  # a start has no event to wait for but its answer
        raise RuntimeError(f"no server at {self.url}:\n{self.log.read_text(errors='replace')[-3000:]}")

    def processes(self) -> list[psutil.Process]:
        """Itself and all it started that run now; remembered, so that `leave` can tell what outlives it."""
        with contextlib.suppress(psutil.Error):
            top = psutil.Process(self.process.pid)
            for process in (top, *top.children(recursive=True)):
                self._seen[process.pid] = process
        return [process for process in self._seen.values() if _runs(process)]

    def roles(self) -> dict[str, psutil.Process]:
        """The processes by what they do."""
        found: dict[str, psutil.Process] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                found.setdefault(role(process, self.process.pid), process)
        return found

    def stop(self, how: signal.Signals = signal.SIGTERM, seconds: float = 60.0) -> list[psutil.Process]:
        """Signals it and waits; returns what of it is still there ``END_SECONDS`` after, and ends that."""
        self.processes()
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return self.leave()

    def leave(self) -> list[psutil.Process]:
        """What still runs ``END_SECONDS`` after the end; it is ended then."""
        others = [process for process in self._seen.values() if process.pid != self.process.pid]
        _, alive = psutil.wait_procs(others, timeout=END_SECONDS)
        left = [process for process in alive if _runs(process)]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return left


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def role(process: psutil.Process, launcher: int) -> str:
    """What a server's process does, by its title, its command and its parent."""
    if process.pid == launcher:
        return "launcher"
    words = " ".join(process.cmdline())
    for part, name in (
        ("scheduler_DP", ""),
        ("sglang::scheduler", "rank 0"),
        ("data_parallel_controller", "controller"),
        ("detokenizer", "detokenizer"),
        ("exporter", "exporter"),
        ("experts.calls.worker", "worker"),
        ("resource_tracker", "resource tracker"),
    ):
        if part in words:
            return name or f"rank {words.split(part)[1].split()[0]}"
    return "front" if process.ppid() == launcher else "template"


def serve(
    here: Place,
    model: Path,
    *flags: str,
    name: str = "server",
    port: int | None = None,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Running:
    """``asyncep serve`` with keys, on two ranks; returns at once."""
    port = port or free_port()
    command = [*prefix, sys.executable, "-m", "asyncep", "serve", "--model-path", str(model), "--port", str(port)]
    command += ["--dp-size", "2", "--api-key", KEY, "--admin-api-key", ADMIN_KEY, *_FLAGS, *flags]
    return _run(here, command, f"http://127.0.0.1:{port}", name, environment)


def route(here: Place, workers: Sequence[str], *flags: str, name: str = "router", port: int | None = None) -> Running:
    """The HTTP router in front of ``workers``; returns at once."""
    port = port or free_port()
    command = [sys.executable, "-m", "asyncep_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", "0", "--api-key", KEY, "--worker-urls", *workers, *flags]
    return _run(here, command, f"http://127.0.0.1:{port}", name)


def _run(
    here: Place, command: Sequence[str], url: str, name: str, environment: Mapping[str, str] | None = None
) -> Running:
    log = here.folder / f"{name}-{time.monotonic_ns()}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**here.environment, **(environment or {})},
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    return Running(process, url, log)
