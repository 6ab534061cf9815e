"""Ports of this host: chosen where no connection takes them, and looked at without connecting to them.

A port of the ephemeral range may become the near end of any connection, even of one to itself: a client that polls it
before anybody listens can so hold it against the server it waits for.
"""

from __future__ import annotations

import errno
import random
import socket
from collections import OrderedDict
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
# Below are ports of well-known services and of registered ones people do use.
_LOWEST = 20000
_LISTENING = "0A"
_TRIES = 1000
# Servers that are started together must not be given the same port before one of them listens, whichever processes of
# this host start them: a name that only one of them can have says whose a port is. Held for so many ports at most.
_MOST_GIVEN = 64
_given: OrderedDict[int, socket.socket] = OrderedDict()


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nobody listens now and that the kernel gives to no connection of its own accord."""
    quiet, chance = _quiet_ports(), random.SystemRandom()
    for _ in range(_TRIES if quiet else 0):
        port = chance.choice(quiet)
        if is_free(port, host) and _take(port):
            return port
    # A host whose every port is ephemeral.
    with socket.create_server((host, 0), family=_family(host)) as probe:
        return int(probe.getsockname()[1])


def _take(port: int) -> bool:
    """Makes a port this process's, unless it is somebody's who has asked here too. The kernel frees it at an end."""
    if port in _given:
        return False
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        mark.bind(f"\0asyncep-port-{port}")
    except OSError as error:
        mark.close()
        # Where no such names are to be had, ports are given as if nobody else were.
        return error.errno != errno.EADDRINUSE
    _given[port] = mark
    if len(_given) > _MOST_GIVEN:
        _, oldest = _given.popitem(last=False)
        oldest.close()
    return True


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket(_family(host)) as probe:
        # As servers do: what is left of closed connections is in nobody's way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # Two may be bound so, but only one listens.
            probe.listen(1)
        except OSError as error:
            # Whatever else is wrong with the address, the server says better.
            return error.errno != errno.EADDRINUSE
        return True


def is_listening(port: int) -> bool:
    """Whether anybody listens on a port of this host; read from the kernel's table, without a connection."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *_ = line.split()
            if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


def _quiet_ports() -> list[int]:
    try:
        first, last = map(int, _RANGE.read_text().split())
    except (OSError, ValueError):
        first, last = 32768, 60999
    reserved = _reserved()
    below = range(min(_LOWEST, max(1025, first - 1000)), first)
    return [port for port in (below or range(last + 1, 65536)) if port not in reserved]


def _reserved() -> set[int]:
    """Ports that the host's administrator keeps for something."""
    try:
        text = _RESERVED.read_text().strip()
    except OSError:
        return set()
    found: set[int] = set()
    for entry in filter(None, text.split(",")):
        first, _, last = entry.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
