"""Processes forked ahead of need, so that a server imports SGLang once and not once a process.

SGLang spawns its processes, and each imports torch, Transformers and SGLang anew: 12 s of a core before it does
anything. Here a process that has imported them and nothing more forks children, each of which sleeps until it is told
which process to be. They share the imported pages, and a rank that died is replaced by one that only has to map its
weights. Where no child is left, processes are spawned as before.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from multiprocessing import context, popen_fork, popen_spawn_posix, process, reduction, spawn, util
from typing import Any, NamedTuple, NoReturn

from asyncep_sgl import lifeline

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
# Descriptors that come with a process: the ends of its pipes.
_MOST_DESCRIPTORS = 64
_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_STACK)


class _Child(NamedTuple):
    pid: int
    line: socket.socket


_waiting: list[_Child] = []
# By name of a process's function: how many children that process forks ahead before it runs.
_offspring: dict[str, int] = {}
# In a child: its line to the parent, and what came with the process it is to be.
_line: socket.socket | None = None
_descriptors: list[int] = []


def fork_ahead(count: int, offspring: Mapping[str, int] | None = None) -> int:
    """Forks children that wait; returns how many: none if threads run, which a child would not have.

    To be called before the process opens anything that a child should not hold.

    Args:
        count: how many.
        offspring: by name of a process's function, how many children that process forks ahead before it runs.
    """
    _offspring.update(offspring or {})
    if count and len(os.listdir("/proc/self/task")) != 1 + lifeline.threads():
        logger.info("processes are spawned, not forked: this one has threads already")
        return 0
    gc.freeze()  # a collection would write to every object, and so copy every page
    for _ in range(count):
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            ours.close()
            _wait(theirs, parent)
        theirs.close()
        _waiting.append(_Child(pid, ours))
    return count


class PreforkContext(context.SpawnContext):
    """What SGLang's modules use as ``multiprocessing``: its processes are children that wait, while there are any."""

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        multiprocessing.set_start_method(method, force=force)


class _Process(context.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        while _waiting:
            child = _waiting.pop(0)
            try:
                return _Popen(process_obj, child)
            except (BrokenPipeError, ConnectionResetError, ProcessLookupError):
                os.waitpid(child.pid, 0)  # it has been killed: the next one
        return popen_spawn_posix.Popen(process_obj)


PreforkContext.Process = _Process


class _Inherited(NamedTuple):
    """A descriptor in a pickle: its place among those that are sent beside it."""

    place: int

    def detach(self) -> int:
        return _descriptors[self.place]


class _Popen(popen_fork.Popen):
    """A process in the standard library's sense that is one of the children."""

    method = "spawn"
    DupFd = _Inherited

    def __init__(self, process_obj: Any, child: _Child) -> None:
        self._child = child
        self._sent: list[int] = []
        super().__init__(process_obj)

    def duplicate_for_child(self, descriptor: int) -> int:
        self._sent.append(descriptor)
        return len(self._sent) - 1

    def _launch(self, process_obj: Any) -> None:
        pid, line = self._child
        preparation = spawn.get_preparation_data(process_obj._name)
        for main in ("init_main_from_name", "init_main_from_path"):
            preparation.pop(main, None)  # the child has the main module already
        payload = io.BytesIO()
        context.set_spawning_popen(self)  # type: ignore[arg-type] # it needs only what pickling a pipe asks of it
        try:
            reduction.dump((dict(os.environ), preparation), payload)
            reduction.dump(process_obj, payload)
        finally:
            context.set_spawning_popen(None)
        for limit in _LIMITS:
            resource.prlimit(pid, limit, resource.getrlimit(limit))
        socket.send_fds(line, [b"x"], self._sent)
        line.sendall(payload.getbuffer())
        line.shutdown(socket.SHUT_WR)
        self.pid = pid
        self.sentinel = os.pidfd_open(pid)
        # The child sees that its parent has ended by the end of this line.
        self.finalizer = util.Finalize(self, _close, (self.sentinel, line.detach()))


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _wait(line: socket.socket, parent: int) -> NoReturn:
    """The life of a child."""
    status = 1
    try:
        _let_go()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            status = _become(line)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)


def _let_go() -> None:
    """Gives up what is the parent's: its lines to its other children and its own parent, and its signal handlers."""
    for child in _waiting:
        child.line.close()
    _waiting.clear()
    if _line is not None:
        _line.close()
    _close(*_descriptors)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)) and number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)


def _become(line: socket.socket) -> int:
    """Waits for a process, is it, and returns its exit status."""
    global _line
    _line = line
    _, _descriptors[:], _, _ = socket.recv_fds(line, 1, _MOST_DESCRIPTORS)
    with line.makefile("rb") as stream:
        payload = io.BytesIO(stream.read())
    if not payload.getbuffer().nbytes:
        return 0  # the parent has no use for it
    this: Any = process.current_process()
    this._inheriting = True
    try:
        environment, preparation = pickle.load(payload)
        _take_environment(environment)
        spawn.prepare(preparation)
        process_obj = pickle.load(payload)
    finally:
        del this._inheriting
    fork_ahead(_offspring.get(getattr(process_obj._target, "__name__", ""), 0))
    status: int = process_obj._bootstrap(parent_sentinel=line.fileno())
    return status


def _take_environment(environment: Mapping[str, str]) -> None:
    # Only what differs: a process's title is written over its first environment, if that is still where it was.
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
