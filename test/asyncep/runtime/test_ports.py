"""Where a runtime's server listens, and what becomes of a start that cannot be."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncep import Runtime, local_server
from asyncep.cli import main
from asyncep.local_server import StartError, _Place, _wait_until_ready
from asyncep_sgl.process import ports
from asyncep_sgl.process.ports import free_port, is_free, is_listening


@pytest.fixture
def taken() -> Iterator[int]:
    """A port with somebody on it, in the ephemeral range as a user may have chosen it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_ports_lie_where_the_kernel_takes_none_for_connections() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    chosen = {free_port() for _ in range(200)}
    assert all(not first <= port <= last for port in chosen)
    # Two that choose at once rarely choose the same.
    assert len(chosen) > 100


@pytest.mark.parametrize(
    ("written", "reserved", "allowed"),
    [
        ("32768\t60999", "", range(20000, 32768)),
        ("32768\t60999", "20000-32000,32005", [*range(32001, 32005), *range(32006, 32768)]),
        ("1024\t60999", "", range(61000, 65536)),
        ("15000\t65535", "", range(14000, 15000)),
    ],
)
def test_ranges_as_hosts_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, reserved: str, allowed: Any
) -> None:
    (tmp_path / "range").write_text(written + "\n")
    (tmp_path / "reserved").write_text(reserved + "\n")
    monkeypatch.setattr(ports, "_RANGE", tmp_path / "range")
    monkeypatch.setattr(ports, "_RESERVED", tmp_path / "reserved")
    assert ports._quiet_ports() == list(allowed)
    assert free_port() in allowed


def test_a_port_that_is_taken(taken: int) -> None:
    assert is_listening(taken)
    assert not is_free(taken)
    with socket.create_server(("0.0.0.0", 0)) as everywhere:
        assert not is_free(everywhere.getsockname()[1])
    free = free_port()
    assert is_free(free)
    assert not is_listening(free)


def test_two_processes_are_not_given_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though neither listens yet. What a process was given is free again when it has ended."""
    few = sorted(free_port() for _ in range(4))
    for port in few:
        ports._given.pop(port).close()
    monkeypatch.setattr(ports, "_quiet_ports", lambda: few)
    program = f"""
import sys
from asyncep_sgl.process import ports
ports._quiet_ports = lambda: {few}
print(ports.free_port(), ports.free_port(), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        theirs = set(map(int, other.stdout.readline().split()))
        mine = {free_port(), free_port()}
        assert sorted(theirs | mine) == few
        other.stdin.close()
        assert other.wait(30) == 0
    assert {free_port(), free_port()} == theirs


def test_no_more_than_some_ports_are_held() -> None:
    given = [free_port() for _ in range(100)]
    assert len(set(given[-64:])) == 64
    assert len(ports._given) == 64


def test_a_connection_to_itself_is_no_listener() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
        # What a client that polls an ephemeral port may come to: its connection has both ends.
        probe.connect(address)
        assert probe.getsockname() == probe.getpeername()
        assert not is_listening(address[1])


def test_a_runtime_does_not_start_on_a_port_of_somebody_elses(taken: int) -> None:
    with pytest.raises(StartError, match=rf"^port {taken}: something else listens there; end it, or choose another"):
        Runtime("no such model", port=taken).start()


@pytest.mark.parametrize("port", ["0", "70000", "http", "-1"])
def test_what_is_no_port(port: str) -> None:
    with pytest.raises(StartError, match=rf"^port {port}: a number from 1 to 65535"):
        Runtime("no such model", port=port).start()


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        ([], "http://127.0.0.1:9"),
        (["--port", "9"], "http://127.0.0.1:9"),
        (["--port=9", "--host=0.0.0.0"], "http://127.0.0.1:9"),
        (["--host", "::"], "http://[::1]:9"),
        (["--host", "10.0.0.1", "--dp-size", "2"], "http://10.0.0.1:9"),
        (["--ssl-certfile", "c.pem"], "https://127.0.0.1:9"),
    ],
)
def test_where_a_server_is_looked_for(arguments: list[str], url: str) -> None:
    place = _Place.of(arguments)
    assert place.url(place.port or 9) == url
    assert (place.port == 9) == any("port" in argument for argument in arguments)


def test_a_long_start_is_told_of_and_ends_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local_server, "_TELL_SECONDS", 0.2)
    monkeypatch.setattr(local_server, "_BETWEEN_SECONDS", 0.05)
    program = "import time; print('loading the experts', flush=True); time.sleep(600)"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=log)
        try:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            with caplog.at_level(logging.WARNING, "asyncep"), pytest.raises(StartError) as error:
                _wait_until_ready(process, url, port, log.fileno(), 3.0, local_server._warn)
        finally:
            process.kill()
            process.wait()
    assert "loading the experts" in str(error.value)
    assert re.search(r"not ready after 3 s", str(error.value))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) >= 2
    assert re.search(r"still starting after \d+ s; its last words: loading the experts", told[-1])


def test_keys_are_not_in_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("from a file\n")
    runtime = Runtime("model", api_key=f"@{tmp_path / 'key'}", admin_api_key="the admin's")
    assert not [flag for flag in runtime._flags if "key" in flag or "admin" in flag]
    assert runtime._environment == {"ASYNCEP_API_KEY": "from a file", "ASYNCEP_ADMIN_API_KEY": "the admin's"}
    assert runtime._api_key == "from a file"
    monkeypatch.setenv("ASYNCEP_API_KEY", "around")
    assert Runtime.connect("127.0.0.1:9")._api_key == "around"
    with pytest.raises(ValueError, match=r"api_key: .*the key cannot be read"):
        Runtime.connect("127.0.0.1:9", api_key="@/no/such/file")


def test_the_command_says_which_file_a_key_is_not_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    command = ["classify", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--labels", "a,b"]
    assert main([*command, "--url", "127.0.0.1:9", "--api-key", "@/no/such/file"]) == 2
    assert "/no/such/file: the key cannot be read" in capsys.readouterr().err
