"""The front's address is taken first, by nobody else, and clients are refused until it listens."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncep_sgl.errors import UsageError
from asyncep_sgl.process import listening
from asyncep_sgl.process.ports import free_port

LOOPBACK = "127.0.0.1"


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def bound(port: int) -> Iterator[list[socket.socket]]:
    sockets = listening.bind(LOOPBACK, port)
    yield sockets
    for one in sockets:
        one.close()


@pytest.mark.parametrize("options", [(), (socket.SO_REUSEADDR,), (socket.SO_REUSEPORT,)])
@pytest.mark.parametrize("address", [LOOPBACK, "0.0.0.0"])
def test_nobody_else_can_listen_there(
    options: tuple[int, ...], address: str, bound: list[socket.socket], port: int
) -> None:
    with socket.socket() as thief:
        for option in options:
            thief.setsockopt(socket.SOL_SOCKET, option, 1)
        with pytest.raises(OSError, match="in use"):  # noqa: PT012 # some kernels refuse the first, some the second
            thief.bind((address, port))
            thief.listen()
    with pytest.raises(UsageError, match="choose another --port"):
        listening.bind(address, port)


def test_clients_are_refused_until_it_listens_and_cannot_take_the_port(bound: list[socket.socket], port: int) -> None:
    for _ in range(200):
        with socket.socket() as client:
            assert client.connect_ex((LOOPBACK, port)) == errno.ECONNREFUSED
    door = listening.Door(bound)
    assert door.is_of(port)
    for one in door.unlock():
        one.listen()
    with socket.create_connection((LOOPBACK, port)) as client:
        accepted, _ = bound[0].accept()
        with accepted:
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"


def test_connections_of_an_earlier_server_do_not_keep_the_port(port: int) -> None:
    (earlier,) = listening.Door(listening.bind(LOOPBACK, port)).unlock()
    with earlier:
        earlier.listen()
        with socket.create_connection((LOOPBACK, port)) as client:
            accepted, _ = earlier.accept()
            # Who closes first keeps the connection's remains on its port for a minute.
            accepted.close()
            assert client.recv(1) == b""
    (again,) = listening.bind(LOOPBACK, port)
    with again:
        for one in listening.Door([again]).unlock():
            one.listen()


@pytest.mark.parametrize("listens", [True, False])
@pytest.mark.parametrize("owner", [LOOPBACK, "0.0.0.0"])
def test_a_port_that_somebody_has_is_refused(owner: str, listens: bool, port: int) -> None:
    with socket.socket() as other:
        other.bind((owner, port))
        if listens:
            other.listen()
        for host in (LOOPBACK, "0.0.0.0", "localhost", ""):
            with pytest.raises(UsageError, match=f"--port {port}.*choose another --port"):
                listening.bind(host, port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.77"])
def test_a_host_that_is_not_here_is_refused(host: str, port: int) -> None:
    with pytest.raises(UsageError, match="--host"):
        listening.bind(host, port)


@pytest.mark.parametrize(("host", "addresses"), [("0.0.0.0", {"0.0.0.0"}), ("127.0.0.1", {"127.0.0.1"})])
def test_every_address_of_a_host_is_taken(host: str, addresses: set[str], port: int) -> None:
    sockets = listening.bind(host, port)
    try:
        assert {one.getsockname()[0] for one in sockets} == addresses
    finally:
        for one in sockets:
            one.close()


def test_it_is_handed_to_the_front_and_to_none_of_its_children(port: int) -> None:
    script = (
        "import os, socket, subprocess, sys\n"
        "from asyncep_sgl.process import listening\n"
        "door = listening.inherited()\n"
        "assert 'ASYNCEP_LISTENERS' not in os.environ\n"
        "number = door.sockets[0].fileno()\n"
        "looks = 'import os,sys; print(os.path.exists(sys.argv[1]))'\n"
        "spawned = subprocess.run([sys.executable, '-c', looks, f'/proc/self/fd/{number}'], close_fds=False,\n"
        "    capture_output=True, text=True).stdout.strip()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if listening.door is None and not os.path.exists(f'/proc/self/fd/{number}') else 1)\n"
        "forked = os.waitpid(child, 0)[1]\n"
        "for one in door.unlock():\n"
        "    one.listen()\n"
        "print(spawned, forked, flush=True)\n"
        "sys.stdin.read()\n"
    )
    sockets = listening.bind(LOOPBACK, port)
    front = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **listening.hand_on(sockets)},
        pass_fds=[one.fileno() for one in sockets],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for one in sockets:
        one.close()
    with front:
        assert front.stdout is not None
        assert front.stdin is not None
        # `inherited` registers what closes them in a child: the spawned one has none, the forked one let go.
        assert front.stdout.readline().split() == ["False", "0"]
        socket.create_connection((LOOPBACK, port)).close()
        front.kill()
    with socket.socket() as client:
        assert client.connect_ex((LOOPBACK, port)) == errno.ECONNREFUSED


def test_ports_for_servers_lie_below_those_of_clients() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    assert all(1024 <= port < lowest for port in ports)
