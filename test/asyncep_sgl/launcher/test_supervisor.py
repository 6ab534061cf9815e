"""The launcher over real processes: any that is killed, stopped or told to stop, at any moment; nothing is left."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "support" / "supervised.py"
# Ample: nothing here computes.
PATIENCE = 60.0
ROLES = ("front", "controller", "detokenizer", "exporter")


@dataclass
class Launched:
    """A running `supervised.py`."""

    process: subprocess.Popen[str]
    pids: dict[str, int] = field(default_factory=dict)
    directory: Path = Path()
    everything: list[psutil.Process] = field(default_factory=list)

    def wait_until_serving(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            name, _, value = line.strip().partition(" ")
            if name == "directory":
                self.directory = Path(value)
                break
            self.pids[name] = int(value)
        assert set(self.pids) == set(ROLES)
        self.everything = psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> tuple[int, str]:
        """Waits for the launcher; returns its status and its last line, having seen that nothing is left."""
        assert self.process.stderr is not None
        printed = self.process.stderr.read()
        status = self.process.wait(PATIENCE)
        self.check_nothing_is_left()
        return status, printed.strip().splitlines()[-1]

    def check_nothing_is_left(self) -> None:
        _, alive = psutil.wait_procs(self.everything, timeout=PATIENCE)
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
        assert not self.directory.exists()

    def next_line(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline()


@pytest.fixture
def launch() -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def start(grace: float = 30.0, drain: str = "at once") -> Launched:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "launcher", str(grace)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "DRAIN": drain},
        )
        started.append(Launched(process))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        for stream in (each.process.stdout, each.process.stderr):
            if stream is not None:
                stream.close()


@pytest.mark.parametrize(
    ("role", "number"),
    [
        ("front", signal.SIGKILL),
        ("controller", signal.SIGKILL),
        ("controller", signal.SIGSEGV),
        ("detokenizer", signal.SIGKILL),
        ("detokenizer", signal.SIGTERM),
    ],
)
def test_whose_end_it_was_and_how(role: str, number: signal.Signals, launch: Callable[..., Launched]) -> None:
    launched = launch()
    launched.wait_until_serving()
    os.kill(launched.pids[role], number)
    status, last = launched.end()
    assert status == 1
    how = f"{role} (process {launched.pids[role]}) was killed by {number.name}"
    assert last == f"asyncep: {how}; the server has ended"


def test_an_exporter_that_dies_is_started_again(launch: Callable[..., Launched]) -> None:
    launched = launch()
    launched.wait_until_serving()
    os.kill(launched.pids["exporter"], signal.SIGKILL)
    assert launched.next_line() == "asyncep: the exporter was killed by SIGKILL; it is started again\n"
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end()[0] == 0


@pytest.mark.parametrize("role", ROLES)
def test_what_a_signal_has_stopped_goes_on(role: str, launch: Callable[..., Launched]) -> None:
    launched = launch()
    launched.wait_until_serving()
    os.kill(launched.pids[role], signal.SIGSTOP)
    assert launched.next_line() == f"asyncep: {role} (process {launched.pids[role]}) is stopped; it is told to go on\n"
    deadline = time.monotonic() + PATIENCE
    while psutil.Process(launched.pids[role]).status() == psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end()[0] == 0


@pytest.mark.parametrize(
    ("number", "stopped"),
    [(signal.SIGINT, None), (signal.SIGHUP, None), *((signal.SIGTERM, role) for role in ROLES)],
)
def test_a_stop_drains_whoever_stands_still(
    number: signal.Signals, stopped: str | None, launch: Callable[..., Launched]
) -> None:
    # Its grace is longer than this test may take: only the front's own end can be what it saw.
    launched = launch(grace=10 * PATIENCE)
    launched.wait_until_serving()
    if stopped is not None:
        os.kill(launched.pids[stopped], signal.SIGSTOP)
    launched.process.send_signal(number)
    status, _ = launched.end()
    assert status == 0


def test_the_grace_period_ends_a_stop(launch: Callable[..., Launched]) -> None:
    launched = launch(grace=0.5, drain="never")
    launched.wait_until_serving()
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end() == (0, "asyncep: requests still in flight after 0 s are dropped")


@pytest.mark.parametrize("role", ["front", "controller", "detokenizer"])
def test_a_second_signal_or_a_death_cuts_a_stop_short(role: str, launch: Callable[..., Launched]) -> None:
    launched = launch(grace=10 * PATIENCE, drain="never")
    launched.wait_until_serving()
    launched.process.send_signal(signal.SIGTERM)
    assert launched.next_line() == "asyncep: SIGTERM: stopping\n"
    if role == "front":
        launched.process.send_signal(signal.SIGINT)
    else:
        os.kill(launched.pids[role], signal.SIGKILL)
    assert launched.process.wait(PATIENCE) == 0
    launched.check_nothing_is_left()


@pytest.mark.parametrize("serving", [False, True])
def test_nothing_outlives_a_launcher_that_is_killed(serving: bool, launch: Callable[..., Launched]) -> None:
    launched = launch()
    if serving:
        launched.wait_until_serving()
    else:
        # At its first child, which has not yet run a line of ours.
        while not launched.everything:
            assert launched.process.poll() is None
            launched.everything = psutil.Process(launched.process.pid).children(recursive=True)
    descriptors = [os.pidfd_open(each.pid) for each in launched.everything]
    launched.process.kill()
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], PATIENCE)[0]
        os.close(descriptor)
    if serving:
        assert not launched.directory.exists()


def test_a_signal_before_there_is_anything_ends_the_start() -> None:
    script = (
        "import os, signal, sys\n"
        "import asyncep_sgl.launch_server as launch\n"
        "launch.parse = lambda _: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(launch.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.strip() == "asyncep: SIGTERM: stopped before anything was started"
