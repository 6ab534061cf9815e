"""The front's address, taken before anything else is done and handed on, so that nobody else can have it meanwhile.

The sockets are bound but do not listen yet: a client is refused, as by a server that is not there, until the front
answers. They must not be shared either: of two sockets bound with ``SO_REUSEADDR``, the one that listens first has the
port. It is set while binding, so that connections of an earlier server that are dying do not count, and then cleared.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncep_sgl.errors import UsageError

LISTENERS_VARIABLE = "ASYNCEP_LISTENERS"
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def bind(host: str, port: int) -> list[socket.socket]:
    """Takes ``port`` on every address of ``host``.

    Raises:
        UsageError: somebody else has it, or ``host`` is no address of this machine.
    """
    bound: list[socket.socket] = []
    absent: OSError | None = None
    try:
        with contextlib.ExitStack() as on_failure:
            for family, address in _addresses(host, port):
                try:
                    one = socket.socket(family, socket.SOCK_STREAM)
                    on_failure.callback(one.close)
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    one.bind(address)
                except OSError as error:
                    if error.errno not in _ABSENT:
                        raise
                    # A name may have an address of a family that this machine does without.
                    absent = error
                    continue
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
                bound.append(one)
            if absent is not None and not bound:
                raise absent
            on_failure.pop_all()
    except OSError as error:
        raise UsageError(
            f"--host {host} --port {port}: {error.strerror}; if another server listens there choose another --port"
        ) from error
    return bound


def hand_on(sockets: Sequence[socket.socket]) -> dict[str, str]:
    """The variable by which a child process, given the descriptors, finds them."""
    return {LISTENERS_VARIABLE: ",".join(str(one.fileno()) for one in sockets)}


@dataclass
class Door:
    """The front's sockets.

    Attributes:
        sockets: bound, until the front listens.
        opened: set once clients are answered.
    """

    sockets: list[socket.socket]
    opened: threading.Event = field(default_factory=threading.Event)

    def is_of(self, port: int) -> bool:
        """Whether these sockets are bound to ``port``."""
        return any(one.getsockname()[1] == port for one in self.sockets)

    def unlock(self) -> list[socket.socket]:
        """The sockets, for listening right away: connections of an earlier server that are dying do not count."""
        for one in self.sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return self.sockets

    def wait(self) -> None:
        """Returns once clients are answered.

        Raises:
            RuntimeError: the process ends without.
        """
        while not self.opened.wait(0.5):
            if not threading.main_thread().is_alive():
                raise RuntimeError("the front ends before it listens")


door: Door | None = None


def inherited() -> Door:
    """The sockets this process was given, which are `door` from now on. No child of it, forked or spawned, has them."""
    global door
    numbers = [int(number) for number in os.environ.pop(LISTENERS_VARIABLE, "").split(",") if number]
    door = Door([socket.socket(fileno=number) for number in numbers])
    for one in door.sockets:
        one.set_inheritable(False)
    os.register_at_fork(after_in_child=_leave)
    return door


def _leave() -> None:
    global door
    for one in door.sockets if door is not None else ():
        one.close()
    door = None


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: {error.strerror}; give an address of this machine") from error
    wanted = [(family, address) for family, _, _, _, address in found if family in (socket.AF_INET, socket.AF_INET6)]
    return list(dict.fromkeys(wanted))
