"""Processes forked ahead of need, so that a server imports SGLang once and not once a process.

SGLang spawns its processes, and each imports torch, Transformers and SGLang anew: 12 s of a core before it does
anything. Here a process that has imported them and nothing more forks children, each of which sleeps until it is told
which process to be. They share the imported pages, and a rank that died is replaced by one that only has to map its
weights.

A process that will need others for as long as it lives, as the router needs ranks, cannot fork them itself: it has
threads by then. It keeps *templates*, children with one thread that fork on demand and are never used up. What a
template forks becomes its owner's child, as if the owner had forked it. There are two: when one is killed, the other
forks its successor in milliseconds, where importing everything anew takes many seconds. Where there is no child and no
template, processes are spawned as before.
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
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing import connection, context, popen_fork, popen_spawn_posix, process, reduction, spawn, util
from typing import Any, NamedTuple, NoReturn

from asyncep_sgl.process import lifeline

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# Descriptors that come with a process: the ends of its pipes.
_MOST_DESCRIPTORS = 64
_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_STACK)
_TEMPLATES = 2
# A template answers in milliseconds; one that is started anew imports everything first.
_TEMPLATE_SECONDS = 10.0
_NEW_TEMPLATE_SECONDS = 180.0
# Between two attempts to have as many templates as there should be, where one fails.
_MEND_AGAIN_SECONDS = 30.0
# What a template is asked for.
_A_CHILD = b"c"
_A_TEMPLATE = b"t"

_PID_BYTES = 8


class _Child(NamedTuple):
    pid: int
    line: socket.socket


_waiting: list[_Child] = []
# Names of the functions whose processes keep templates.
_keepers: set[str] = set()
_templates: Templates | None = None
# In a child: its line to the parent, and what came with the process it is to be.
_line: socket.socket | None = None
_descriptors: list[int] = []


def fork_ahead(count: int, keepers: Collection[str] = ()) -> int:
    """Forks children that wait; returns how many: none if threads run, which a child would not have.

    To be called before the process opens anything that a child should not hold.

    Args:
        count: how many.
        keepers: names of functions; a child that is to run one of them keeps templates (`keep_templates`).
    """
    _keepers.update(keepers)
    if not _can_fork():
        return 0
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


def keep_templates() -> bool:
    """Forks templates for this process, from which every process that it starts later is forked.

    To be called before the process opens anything that a child should not hold. Returns False if threads run.
    """
    global _templates
    if not _can_fork():
        return False
    # What a template forks would else become a child of the launcher, which is the next subreaper above.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    owner = os.getpid()
    templates: list[_Child] = []
    for _ in range(_TEMPLATES):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            for template in templates:
                template.line.close()
            _be_template(theirs, owner, announce=False)
        theirs.close()
        templates.append(_Child(pid, ours))
    _templates = Templates(templates)
    return True


def template_pids() -> set[int]:
    """The processes that this one's processes are forked from."""
    return _templates.pids() if _templates is not None else set()


def reap_orphans(known: Collection[int]) -> None:
    """Takes the exit statuses of processes that came to this one because their parents ended.

    Args:
        known: children whose statuses somebody waits for; they are left alone.
    """
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in known:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(ended.si_pid, os.WNOHANG)


def _can_fork() -> bool:
    if len(os.listdir("/proc/self/task")) != 1 + lifeline.threads():
        logger.info("processes are spawned, not forked: this one has threads already")
        return False
    gc.freeze()  # a collection would write to every object, and so copy every page
    return True


class Templates:
    """The owner's end of its templates. Any thread may ask; one of its own replaces templates that have ended."""

    def __init__(self, templates: list[_Child]) -> None:
        self._templates = templates
        self._lock = threading.Lock()
        threading.Thread(target=self._keep, name="templates", daemon=True).start()

    def pids(self) -> set[int]:
        """Their processes, those that have ended but are not replaced yet among them."""
        return {template.pid for template in self._templates}

    def child(self) -> _Child:
        """A new child of this process that waits to be told what to be.

        Where no template is left or answers, one is started anew.

        Raises:
            OSError: that one does not answer either.
        """
        with self._lock:
            return self._forked(_A_CHILD)

    def _keep(self) -> None:
        while True:
            with self._lock:
                self._drop(_has_ended)
                whole = self._fill_up()
                ends = [os.pidfd_open(template.pid) for template in self._templates]
            # One that another thread drops ends too, so that this is never asleep over others than there are.
            with contextlib.closing(select.epoll()) as sleep:
                for end in ends:
                    sleep.register(end, select.EPOLLIN)
                sleep.poll(None if whole else _MEND_AGAIN_SECONDS)
            _close(*ends)

    def _fill_up(self) -> bool:
        try:
            while len(self._templates) < _TEMPLATES:
                self._templates.append(self._forked(_A_TEMPLATE))
        except OSError as error:
            logger.warning("no template of processes can be had (%s: %s)", type(error).__name__, error)
        return len(self._templates) == _TEMPLATES

    def _forked(self, what: bytes) -> _Child:
        while self._templates:
            template = self._templates[0]
            try:
                return _ask(template.line, what, _TEMPLATE_SECONDS)
            except OSError as error:
                logger.warning("a template of processes is replaced (%s: %s)", type(error).__name__, error)
                self._drop(lambda each, gone=template: each is gone)  # type: ignore[misc]
        anew = _new_template()
        self._templates.append(anew)
        try:
            return _ask(anew.line, what, _NEW_TEMPLATE_SECONDS)
        except OSError:
            self._drop(lambda each: each is anew)
            raise

    def _drop(self, gone: Callable[[_Child], bool]) -> None:
        for template in [each for each in self._templates if gone(each)]:
            self._templates.remove(template)
            template.line.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(template.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(template.pid, 0)


def _has_ended(child: _Child) -> bool:
    try:
        return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _ask(line: socket.socket, what: bytes, seconds: float) -> _Child:
    """What a template forks for this process."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            socket.send_fds(line, [what], [theirs.fileno()])
        ours.settimeout(seconds)
        said = ours.recv(_PID_BYTES, socket.MSG_WAITALL)
        if len(said) != _PID_BYTES:
            raise ConnectionResetError("it has ended")
        ours.settimeout(None)
    except OSError:
        ours.close()
        raise
    return _Child(int.from_bytes(said, sys.byteorder), ours)


def _new_template() -> _Child:
    """A template that imports everything before it answers."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "asyncep_sgl.process.template", str(theirs.fileno()), str(os.getpid())]
        started = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    started.returncode = 0  # waited for by its number when it ends
    return _Child(started.pid, ours)


def serve_template(line: socket.socket, owner: int) -> NoReturn:
    """The life of a template: forks a child of process ``owner`` for each descriptor that comes, until ``owner`` ends.

    A child is forked by a process between, which ends at once: its parent is then the next subreaper above, the owner.
    """
    while True:
        what, descriptors, _, _ = socket.recv_fds(line, 1, 1)
        if not what:
            os._exit(0)
        theirs = socket.socket(fileno=descriptors[0])
        between = os.fork()
        if between == 0:
            me = os.getpid()
            if os.fork():
                os._exit(0)
            line.close()
            while os.getppid() == me:
                time.sleep(0.001)
            if what == _A_TEMPLATE:
                _be_template(theirs, owner, announce=True)
            _wait(theirs, owner, announce=True)
        theirs.close()
        os.waitpid(between, 0)


def _be_template(line: socket.socket, owner: int, announce: bool) -> NoReturn:
    """The life of a process that has been forked to be a template. ``announce``: as for `_wait`."""
    try:
        _let_go()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == owner:
            if announce:
                line.sendall(os.getpid().to_bytes(_PID_BYTES, sys.byteorder))
            serve_template(line, owner)
    finally:
        os._exit(1)


class PreforkContext(context.SpawnContext):
    """What SGLang's modules use as ``multiprocessing``: its processes are children that wait, while there are any."""

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        multiprocessing.set_start_method(method, force=force)


class _Process(context.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        popen = _started(process_obj)
        for argument in process_obj._args:
            # The child has its own. With this one open, whoever waits for what the child writes would not see its end.
            if isinstance(argument, connection.Connection) and not argument.readable:
                argument.close()
        return popen


def _started(process_obj: Any) -> Any:
    while _waiting:
        child = _waiting.pop(0)
        try:
            return _Popen(process_obj, child)
        except (BrokenPipeError, ConnectionResetError, ProcessLookupError):
            os.waitpid(child.pid, 0)  # it has been killed: the next one
    if _templates is not None:
        try:
            return _Popen(process_obj, _templates.child())
        except OSError as error:
            logger.warning("a process is spawned, not forked (%s: %s)", type(error).__name__, error)
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


def _wait(line: socket.socket, parent: int, announce: bool = False) -> NoReturn:
    """The life of a child. ``announce``: its parent does not know its number yet."""
    status = 1
    try:
        _let_go()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            if announce:
                line.sendall(os.getpid().to_bytes(_PID_BYTES, sys.byteorder))
            status = _become(line)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)


def _let_go() -> None:
    """Gives up what is the parent's: its lines to its other children and its own parent, and its signal handlers."""
    global _line, _templates
    for child in _waiting:
        child.line.close()
    _waiting.clear()
    _templates = None
    if _line is not None:
        _line.close()
    _line = None
    _close(*_descriptors)
    _descriptors.clear()
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
    if getattr(process_obj._target, "__name__", "") in _keepers:
        keep_templates()
    status: int = process_obj._bootstrap(parent_sentinel=line.fileno())
    return status


def _take_environment(environment: dict[str, str]) -> None:
    # Only what differs: a process's title is written over its first environment, if that is still where it was.
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
