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

from asyncep_sgl.experts.store.server import StoreServer
from asyncep_sgl.process.restarts import RestartPolicy
from asyncep_sgl.process.state import has_ended, how_it_ended, is_stopped
from asyncep_sgl.process.stop_signals import DRAIN_SIGNAL, StopSignals
from asyncep_sgl.strategies.base import SideProcess

logger = logging.getLogger(__name__)

_LOOK_AGAIN_SECONDS = 1.0
_PR_SET_CHILD_SUBREAPER = 36
# Parents before children, which end with them: of several that have ended, the first of these is the reason.
_ORDER = ("front", "controller", "detokenizer")


@dataclass
class Supervisor:
    """Runs one server until it ends or is told to.

    Attributes:
        store: the host's experts; their owner is this process, so they outlive any rank.
        command: the front's command line.
        environment: its environment.
        grace_seconds: how long a stop waits for requests in flight.
        on_serving: called once, when the front answers requests.
        side_processes: beside the front; what they are is the strategy's.
        ranks_restart: the router starts a dead rank again, so that its end is not the server's.
        listeners: the front's sockets, which are handed to it; this process keeps none.
        signals: what tells this process to stop.
        stopped_seconds: how long a process may stand still by a signal before it is told to go on.
    """

    store: StoreServer
    command: Sequence[str]
    environment: Mapping[str, str]
    grace_seconds: float
    on_serving: Callable[[], None]
    ranks_restart: bool = False
    side_processes: Sequence[SideProcess] = ()
    listeners: Sequence[socket.socket] = ()
    signals: StopSignals = field(default_factory=StopSignals)
    stopped_seconds: float = 5.0
    _announced: bool = False
    _beside: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _restarts: dict[str, RestartPolicy] = field(default_factory=dict)
    _poll: select.poll = field(default_factory=select.poll)
    _watched: dict[int, tuple[str, int]] = field(default_factory=dict)
    _stopped_since: dict[int, float] = field(default_factory=dict)

    def run(self) -> int:
        """Starts the front and supervises it.

        Returns:
            Exit status: 0 after a stop by signal, 1 when a process of the server died.
        """
        _become_subreaper()
        self.signals.defer()
        # A session of its own: Ctrl-C at the terminal reaches the launcher alone, which then stops in order.
        front = subprocess.Popen(
            self.command,
            env=dict(self.environment),
            start_new_session=True,
            pass_fds=[listener.fileno() for listener in self.listeners],
        )
        for listener in self.listeners:
            # The front's from now on: with it goes the port, and clients are not kept waiting for nobody.
            listener.close()
        self._watch("front", front.pid)
        for process in self.side_processes:
            self._start(process)
        self._poll.register(self.store.descriptor, select.POLLIN)
        self._poll.register(self.signals.descriptor, select.POLLIN)
        try:
            failure = self._loop(front)
        finally:
            self._end_everything()
            front.wait()
            self.signals.close()
            self.store.close()
        if failure is None:
            return 0
        # Only now, when no process is left that could print anything below it.
        logger.error("%s; the server has ended", failure)
        return 1

    def _loop(self, front: subprocess.Popen[bytes]) -> str | None:
        """Why the server cannot go on, or None after a stop by signal."""
        deadline: float | None = None
        while True:
            # Edge-triggered: ZeroMQ's descriptor says only "look", so look until there is nothing left.
            self.store.serve_pending()
            for name, pid in self.store.registry.take_hellos():
                self._watch(name, pid)
            if self.store.registry.url and not self._announced:
                self._announced = True
                self.on_serving()
            now = time.monotonic()
            if self.signals.noted and deadline is None:
                logger.info("%s: stopping", self.signals.name)
                deadline = now + self.grace_seconds
                with contextlib.suppress(ProcessLookupError):
                    front.send_signal(DRAIN_SIGNAL)
            if len(self.signals.noted) > 1:
                return None
            if deadline is not None and now >= deadline:
                logger.warning("requests still in flight after %.0f s are dropped", self.grace_seconds)
                return None
            # One that stands still could not finish what it has: in a stop it is told at once.
            self._wake_stopped(now, 0.0 if deadline is not None else self.stopped_seconds)
            sleep = _LOOK_AGAIN_SECONDS if deadline is None else min(_LOOK_AGAIN_SECONDS, deadline - now)
            ready = {descriptor for descriptor, _ in self._poll.poll(sleep * 1000)}
            if self.signals.descriptor in ready:
                self.signals.clear()
            ended = [descriptor for descriptor in ready if descriptor in self._watched]
            if ended:
                # A process whose threads are still ending is heard of later than its children, which ended with it.
                ended = [descriptor for descriptor, (_, pid) in self._watched.items() if has_ended(pid)] or ended
            ended.sort(key=lambda descriptor: self._place(self._watched[descriptor][0]))
            for descriptor in ended:
                failure = self._ended(descriptor)
                if failure is not None:
                    return None if deadline is not None else failure

    def _ended(self, descriptor: int) -> str | None:
        """A process has ended: why the server cannot go on, or None if it can."""
        name, pid = self._watched[descriptor]
        how = how_it_ended(pid)
        self._forget(descriptor)
        if self.ranks_restart and self._announced and name.startswith("rank "):
            return None
        # What a process said before it ended explains more than how it went.
        self.store.serve_pending()
        if (failure := self.store.registry.failure) is not None:
            return failure
        beside = next((process for process in self.side_processes if process.role == name), None)
        if beside is not None and self._restart(beside, how):
            return None
        return f"{name} (process {pid}) {how}"

    def _wake_stopped(self, now: float, patience: float) -> None:
        """Processes that nobody else looks after and that a signal has stopped go on.

        Nothing else could help: while one of them stands still every client waits. Ranks are the router's to judge.
        """
        for name, pid in self._watched.values():
            if self._place(name) == len(self._order) or not is_stopped(pid):
                self._stopped_since.pop(pid, None)
            elif now - self._stopped_since.setdefault(pid, now) >= patience:
                logger.warning("%s (process %d) is stopped; it is told to go on", name, pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _watch(self, name: str, pid: int) -> None:
        if (name, pid) in self._watched.values():
            return
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            # Gone between its hello and now: the front's end or the next poll tells.
            return
        self._watched[descriptor] = (name, pid)
        self._poll.register(descriptor, select.POLLIN)

    def _forget(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        self._stopped_since.pop(self._watched.pop(descriptor)[1], None)
        os.close(descriptor)

    def _start(self, process: SideProcess) -> None:
        started = subprocess.Popen(process.command, env=dict(self.environment), start_new_session=True)
        self._beside[process.role] = started
        self._watch(process.role, started.pid)

    def _restart(self, process: SideProcess, how: str) -> bool:
        """Whether a side process's end is mended: not if it keeps ending."""
        if not self._restarts.setdefault(process.role, RestartPolicy()).died(0, time.monotonic()):
            return False
        self._beside[process.role].wait()
        logger.warning("the %s %s; it is started again", process.role, how)
        self._start(process)
        return True

    @property
    def _order(self) -> tuple[str, ...]:
        """Roles that nobody but this process looks after."""
        return (*_ORDER, *(process.role for process in self.side_processes))

    def _place(self, name: str) -> int:
        return self._order.index(name) if name in self._order else len(self._order)

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


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return any("multiprocessing.resource_tracker" in part for part in process.cmdline())
    except psutil.Error:
        return False


def _become_subreaper() -> None:
    """Orphans of this server become children of the launcher, so that none can get away from it."""
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
