"""Watches over the processes of one server: starts the front, notices any death, stops everything, leaves nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from asyncep_sgl.drain import DRAIN_SIGNAL
from asyncep_sgl.experts.server import StoreServer
from asyncep_sgl.scheduling.restarts import RestartPolicy

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Supervisor:
    """Runs one server until it ends or is told to.

    Attributes:
        store: the host's experts; their owner is this process, so they outlive any rank.
        command: the front's command line.
        environment: its environment.
        grace_seconds: how long a stop waits for requests in flight.
        exporter: command line of the process through which other hosts read the experts, or None. If it dies it is
            started again: it holds nothing that is not in the store.
        ranks_restart: the router starts a dead rank again, so that its end is not the server's.
        on_serving: called once, when the front answers requests.
    """

    store: StoreServer
    command: Sequence[str]
    environment: Mapping[str, str]
    grace_seconds: float
    on_serving: Callable[[], None]
    ranks_restart: bool = False
    exporter: Sequence[str] | None = None
    _exporter: subprocess.Popen[bytes] | None = None
    _exporter_restarts: RestartPolicy = field(default_factory=RestartPolicy)
    _poll: select.poll = field(default_factory=select.poll)
    _watched: dict[int, tuple[str, int]] = field(default_factory=dict)
    _signals: list[int] = field(default_factory=list)

    def run(self) -> int:
        """Starts the front and supervises it.

        Returns:
            Exit status: 0 after a stop by signal, 1 when a process of the server died.
        """
        _become_subreaper()
        # Python notes a signal in a flag; the byte it also writes here is what wakes the poll below.
        wake_read, wake_write = socket.socketpair()
        for end in (wake_read, wake_write):
            end.setblocking(False)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda received, _frame: self._signals.append(received))
        # A session of its own: Ctrl-C at the terminal reaches the launcher alone, which then stops in order.
        front = subprocess.Popen(self.command, env=dict(self.environment), start_new_session=True)
        self._watch("front", front.pid)
        self._start_exporter()
        self._poll.register(self.store.descriptor, select.POLLIN)
        self._poll.register(wake_read, select.POLLIN)
        try:
            failure = self._loop(front, wake_read)
        finally:
            self._end_everything()
            front.wait()
            signal.set_wakeup_fd(-1)
            self.store.close()
        if failure is None:
            return 0
        # Only now, when no process is left that could print anything below it.
        logger.error("%s; the server has ended", failure)
        return 1

    def _loop(self, front: subprocess.Popen[bytes], wake: socket.socket) -> str | None:
        """Why the server cannot go on, or None after a stop by signal."""
        announced = False
        while True:
            # Edge-triggered: ZeroMQ's descriptor says only "look", so look until there is nothing left.
            self.store.serve_pending()
            for name, pid in self.store.registry.pids.items():
                self._watch(name, pid)
            if self.store.registry.url and not announced:
                announced = True
                self.on_serving()
            if self._signals:
                logger.info("%s: stopping", signal.Signals(self._signals[0]).name)
                self._drain(front, wake)
                return None
            for descriptor, _ in self._poll.poll():
                if descriptor == wake.fileno():
                    with contextlib.suppress(BlockingIOError):
                        wake.recv(64)
                elif descriptor in self._watched:
                    name, pid = self._watched[descriptor]
                    if self.ranks_restart and announced and name.startswith("rank "):
                        self._poll.unregister(descriptor)
                        del self._watched[descriptor]
                        os.close(descriptor)
                        continue
                    if name == "exporter" and self._restart_exporter(descriptor):
                        continue
                    # What a rank said before it ended explains more than how its process went.
                    self.store.serve_pending()
                    failures = self.store.registry.failures
                    return failures[0] if failures else f"{name} (process {pid}) {_how_it_ended(front, pid)}"

    def _watch(self, name: str, pid: int) -> None:
        if any(known == (name, pid) for known in self._watched.values()):
            return
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            # Gone between its hello and now: the front's end or the next poll tells.
            return
        self._watched[descriptor] = (name, pid)
        self._poll.register(descriptor, select.POLLIN)

    def _start_exporter(self) -> None:
        if self.exporter is not None:
            self._exporter = subprocess.Popen(self.exporter, env=dict(self.environment), start_new_session=True)
            self._watch("exporter", self._exporter.pid)

    def _restart_exporter(self, descriptor: int) -> bool:
        """Whether the exporter's end is mended: not if it said why it ended, nor if it keeps ending."""
        self.store.serve_pending()
        if self.store.registry.failures or not self._exporter_restarts.died(0, time.monotonic()):
            return False
        if self._exporter is not None:
            logger.warning("the exporter %s; it is started again", _how_it_ended(self._exporter, self._exporter.pid))
        self._poll.unregister(descriptor)
        del self._watched[descriptor]
        os.close(descriptor)
        self.store.registry.pids.pop("exporter", None)
        self._start_exporter()
        return True

    def _drain(self, front: subprocess.Popen[bytes], wake: socket.socket) -> None:
        """Asks the front to finish what it has; a second signal or the end of the grace period cuts it short."""
        with contextlib.suppress(ProcessLookupError):
            front.send_signal(DRAIN_SIGNAL)
        deadline = time.monotonic() + self.grace_seconds
        heard = len(self._signals)
        ended = select.poll()
        ended.register(wake, select.POLLIN)
        # A rank that is just being started again asks for its experts; requests in flight may wait for it.
        ended.register(self.store.descriptor, select.POLLIN)
        for descriptor, (name, _) in self._watched.items():
            if name == "front":
                ended.register(descriptor, select.POLLIN)
        while front.poll() is None and len(self._signals) == heard:
            left = deadline - time.monotonic()
            if left <= 0:
                logger.warning("requests still in flight after %.0f s are dropped", self.grace_seconds)
                return
            self.store.serve_pending()
            ended.poll(left * 1000)
            with contextlib.suppress(BlockingIOError):
                wake.recv(64)

    def _end_everything(self) -> None:
        """Kills every descendant, however deep; as subreaper this process is the parent of all orphans.

        Python's resource trackers are let be until last: they remove what killed processes left in shared memory and
        end by themselves when those are gone.
        """
        trackers: list[psutil.Process] = []
        for _ in range(100):
            children = psutil.Process().children(recursive=True)
            trackers = [child for child in children if _is_resource_tracker(child)]
            others = [child for child in children if child not in trackers]
            for child in others:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            if not others:
                break
            psutil.wait_procs(others, timeout=0.2)
        _, alive = psutil.wait_procs(trackers, timeout=5)
        for child in alive:
            child.kill()
        psutil.wait_procs(alive, timeout=1)


def _how_it_ended(front: subprocess.Popen[bytes], pid: int) -> str:
    status: int | None
    if pid == front.pid:
        status = front.wait()
    else:
        status = None
        # Ours to reap only if its parent went first; its parent reaps it otherwise and the status is not known here.
        with contextlib.suppress(psutil.Error, psutil.TimeoutExpired):
            status = psutil.Process(pid).wait(timeout=0)
    if status is None:
        return "died"
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return any("multiprocessing.resource_tracker" in part for part in process.cmdline())
    except psutil.Error:
        return False


def _become_subreaper() -> None:
    """Orphans of this server become children of the launcher, so that none can get away from it."""
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
