"""A real server's sockets, starts and ends: what listens where, who may speak to it, what the end of a process does."""

from __future__ import annotations

import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import server as servers
import shared_memory
from server import Server

from asyncep_sgl.process.ports import free_port

pytestmark = pytest.mark.server

PROMPT = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 0}}
# A user without rights.
_NOBODY = 65534
_ENDS_WITHIN = 5.0


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], tiny_model: Callable[[str], Path]) -> Server:
    return serve(tiny_model("qwen3_moe"), "--dtype", "float32")


def listeners(server: Server) -> list[tuple[int, Any]]:
    """Process and address of everything that listens on TCP or takes UDP."""
    found = []
    for process in server.processes():
        for each in process.net_connections("inet"):
            if each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM and not each.raddr):
                found.append((process.pid, each.laddr))
    return found


def unix_sockets(server: Server) -> set[str]:
    """Names of all Unix sockets; that of an abstract one begins with @."""
    inodes = set()
    for process in server.processes():
        for entry in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except FileNotFoundError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {fields[7] for fields in lines if len(fields) == 8 and fields[6] in inodes}


def role_of(server: Server, role: str) -> psutil.Process:
    if role == "front":
        return next(p for p in server.processes()[1:] if p.ppid() == server.process.pid)
    title = {"controller": "sglang::data_parallel_controller", "detokenizer": "sglang::detokenizer"}[role]
    return next(p for p in server.processes() if p.cmdline() and title in " ".join(p.cmdline()))


def test_everything_listens_on_loopback_or_in_the_private_folder(server: Server) -> None:
    found = listeners(server)
    assert {address.ip for _, address in found} == {"127.0.0.1"}, found
    front = role_of(server, "front").pid
    assert [address.port for pid, address in found if pid == front] == [int(server.url.rpartition(":")[2])]
    names = unix_sockets(server)
    folders = {str(Path(name).parent) for name in names}
    assert not [name for name in names if name.startswith("@")]
    assert len(folders) == 1, names
    folder = Path(folders.pop()).stat()
    assert stat.S_IMODE(folder.st_mode) == 0o700
    assert folder.st_uid == os.geteuid()


def test_a_strangers_bytes_do_no_harm(server: Server) -> None:
    chance = random.Random(13)
    before = {process.pid for process in server.processes()}
    status = server.status()
    # Ours; SGLang's are for those who could as well kill it, and the next test shows that others do not get there.
    unix = [name for name in unix_sockets(server) if Path(name).name.startswith("store")]
    assert len(unix) == 3
    for _, address in listeners(server):
        for size in (0, 1, 8, 4096, 100_000):
            with socket.create_connection((address.ip, address.port), timeout=10) as line:
                try:
                    line.sendall(chance.randbytes(size))
                    line.shutdown(socket.SHUT_WR)
                except ConnectionError:
                    continue  # it has hung up already
    for name in unix:
        for size in (0, 1, 64, 4096, 100_000):
            with socket.socket(socket.AF_UNIX) as line:
                line.settimeout(10)
                try:
                    line.connect(name)
                    line.sendall(chance.randbytes(size))
                except (ConnectionError, TimeoutError):
                    continue
    assert server.post("/generate", PROMPT).status_code == 200
    assert [rank["pid"] for rank in server.status()["ranks"]] == [rank["pid"] for rank in status["ranks"]]
    assert {process.pid for process in server.processes()} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_reaches_none_of_its_unix_sockets(server: Server) -> None:
    script = (
        "import os, socket, sys\n"
        f"os.setgroups([]); os.setgid({_NOBODY}); os.setuid({_NOBODY})\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        socket.socket(socket.AF_UNIX).connect(name)\n"
        "    except PermissionError:\n"
        "        continue\n"
        "    sys.exit(f'{name} takes anybody')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *unix_sockets(server)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("role", ["front", "controller", "detokenizer"])
def test_a_process_that_is_stopped_costs_time_only(role: str, server: Server) -> None:
    role_of(server, role).suspend()
    assert server.post("/generate", PROMPT).status_code == 200
    assert role_of(server, role).status() != psutil.STATUS_STOPPED or role == "detokenizer"
    _wait(lambda: role_of(server, role).status() != psutil.STATUS_STOPPED, "it stays stopped")


@pytest.mark.parametrize("role", ["front", "controller", "detokenizer"])
def test_the_end_of_a_process_is_the_servers_at_once(
    role: str, serve: Callable[..., Server], tiny_model: Callable[[str], Path]
) -> None:
    in_shm = shared_memory.names()
    server = serve(tiny_model("qwen3_moe"), ranks=1)
    everything = server.processes()
    folder = Path(min(unix_sockets(server))).parent
    victim = role_of(server, role).pid
    # A rank that stands still keeps requests in flight for certain.
    os.kill(server.status()["ranks"][0]["pid"], signal.SIGSTOP)
    answers: list[str] = []

    def ask() -> None:
        try:
            answers.append(str(server.post("/generate", PROMPT).status_code))
        except httpx.HTTPError as error:
            answers.append(type(error).__name__)

    clients = [threading.Thread(target=ask) for _ in range(8)]
    for client in clients:
        client.start()
    _wait(lambda: httpx.get(server.url + "/router/state").json()["submitted"] >= len(clients), "nothing arrives")
    os.kill(victim, signal.SIGKILL)
    assert server.process.wait(_ENDS_WITHIN) == 1
    last = server.log.read_text().strip().splitlines()[-1]
    assert last == f"asyncep: {role} (process {victim}) was killed by SIGKILL; the server has ended"
    for client in clients:
        client.join(_ENDS_WITHIN)
    assert len(answers) == len(clients)
    _, alive = psutil.wait_procs(everything, timeout=_ENDS_WITHIN)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not folder.exists()
    assert not shared_memory.new_names(in_shm)


@pytest.mark.parametrize(
    ("signals", "moment"),
    [
        ((signal.SIGTERM,), "starting "),
        ((signal.SIGINT,), "server_args="),
        ((signal.SIGTERM, signal.SIGTERM), "Launch DP0"),
        ((signal.SIGKILL,), "starting "),
        ((signal.SIGKILL,), "Launch DP0"),
    ],
)
def test_a_start_can_be_ended_at_any_moment(
    signals: tuple[signal.Signals, ...], moment: str, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    in_shm = shared_memory.names()
    port = free_port()
    command = [sys.executable, "-m", "asyncep", "serve", "--model-path", str(tiny_model("qwen3_moe"))]
    command += ["--port", str(port), "--dp-size", "2"]
    server = servers.run(command, f"http://127.0.0.1:{port}", tmp_path / "log.txt")
    try:
        _wait(lambda: moment in server.log.read_text(), f"no {moment!r}")
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")
        everything = server.processes()
        folder = _run_folder(everything[1].pid)
        for number in signals:
            server.process.send_signal(number)
        status = server.process.wait(30)
        assert status == (-signal.SIGKILL if signal.SIGKILL in signals else 0)
        _, alive = psutil.wait_procs(everything, timeout=30)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        _wait(lambda: not folder.exists(), "the folder stays")
        assert not shared_memory.new_names(in_shm)
    finally:
        server.process.kill()


def test_a_port_that_is_lost_is_the_reason_at_once(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    port = free_port()
    with socket.socket() as other:
        # Bound and silent, as by a client that was connected to itself or a server that is starting.
        other.bind(("127.0.0.1", port))
        command = [sys.executable, "-m", "asyncep", "serve", "--model-path", str(tiny_model("qwen3_moe"))]
        done = subprocess.run([*command, "--port", str(port)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"asyncep serve: --host 127.0.0.1 --port {port}: Address already in use; if another server listens there "
        "choose another --port"
    )


def _run_folder(pid: int) -> Path:
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if entry.startswith(b"TMPDIR="):
            return Path(entry[7:].decode())
    raise AssertionError("the front has no folder of its own")


def _wait(condition: Callable[[], bool], complaint: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.05)
