"""A server of our own for the length of a job: started, waited for, stopped, whatever happens in between.

It is a process of its own, on a leash (`asyncep.leashed`): should this process be killed, it stops by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from asyncep.client.errors import ServerError
from asyncep.errors import CommandError
from asyncep_sgl.process.ports import free_port, is_free, is_listening

logger = logging.getLogger("asyncep")

_QUESTION = httpx.Timeout(30, connect=10)
_BETWEEN_SECONDS = 0.25
# A start that takes longer is told of, and again after each such time.
_TELL_SECONDS = 10.0
# A port that was free when it was chosen may be gone when the server binds it.
_PORT_TRIES = 3
# Far beyond a server's own limit for ending in order.
_END_SECONDS = 300.0

OnWait = Callable[[float, str], None]


class StartError(CommandError, RuntimeError):
    """The server did not come up; carries the end of what it printed."""


@contextlib.contextmanager
def local_server(
    model: str,
    arguments: Sequence[str] = (),
    *,
    start_seconds: float = 600,
    environment: Mapping[str, str] | None = None,
    on_wait: OnWait | None = None,
    on_start: Callable[[subprocess.Popen[bytes]], None] | None = None,
) -> Iterator[str]:
    """``asyncep serve`` on a free port of this host, or on that of ``--port``; yields its URL.

    Args:
        model: checkpoint folder or hub name.
        arguments: further flags of ``asyncep serve``.
        environment: variables for it besides this process'; keys go here, for anybody can read a command line.
        on_wait: told every ten seconds of a long start how many seconds it has taken and what the server printed last;
            by default that is a warning in the log.
        on_start: told of its process when it is ready.

    Raises:
        StartError: it ended, was not ready in time, or its port is in use.
        ServerError: in the place of one that the block raises because the server has ended meanwhile; says how.
    """
    place = _Place.of(arguments)
    for attempt in range(_PORT_TRIES):
        port = place.port or free_port(place.host)
        if not is_free(port, place.host):
            raise StartError(f"--port {port}: something else listens there; end it, or choose another port")
        command = [sys.executable, "-m", "asyncep.leashed", str(os.getpid()), "serve", "--model-path", model]
        # The last of two --port counts, so a port of `arguments` stays what it is.
        command += ["--port", str(port), *arguments]
        with tempfile.TemporaryFile() as log:
            variables = {**os.environ, **(environment or {})}
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables)
            try:
                try:
                    _wait_until_ready(process, place.url(port), port, log.fileno(), start_seconds, on_wait or _warn)
                except StartError:
                    _end(process)
                    if place.port or attempt == _PORT_TRIES - 1 or is_free(port, place.host):
                        raise
                    continue  # somebody else has come to listen there meanwhile
                if on_start:
                    on_start(process)
                try:
                    yield place.url(port)
                except ServerError as error:
                    if ended := how_it_ended(process):
                        raise ServerError(f"{ended}: {error}") from error
                    raise
                return
            finally:
                _end(process)


def how_it_ended(process: subprocess.Popen[bytes]) -> str:
    """In words, how a server that was started here has ended; empty while it runs."""
    status = process.poll()
    if status is None:
        return ""
    # A launcher whose front was killed says so, and ends with a status of its own.
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"the server that was started here (process {process.pid}) {how}"


@dataclass(frozen=True)
class _Place:
    """Where the flags of ``asyncep serve`` make it listen; no port where it is left to us."""

    host: str
    port: int | None
    scheme: str

    @classmethod
    def of(cls, arguments: Sequence[str]) -> _Place:
        flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        flags.add_argument("--host", default="127.0.0.1")
        flags.add_argument("--port")
        flags.add_argument("--ssl-certfile")
        given, _ = flags.parse_known_args(list(arguments))
        if given.port is not None and not (given.port.isdecimal() and 0 < int(given.port) < 65536):
            raise StartError(f"--port {given.port}: a number from 1 to 65535 is needed")
        port = None if given.port is None else int(given.port)
        return cls(given.host, port, "https" if given.ssl_certfile else "http")

    def url(self, port: int) -> str:
        # One that listens everywhere is reached on this host.
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"{self.scheme}://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{port}"


def _wait_until_ready(
    process: subprocess.Popen[bytes], url: str, port: int, log: int, seconds: float, on_wait: OnWait
) -> None:
    began = told = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        if process.poll() is not None:
            printed = _printed(log)
            # Our own lines carry the reason; SGLang's traceback stands above them.
            ours = [line for line in printed.splitlines() if line.startswith("asyncep")]
            raise StartError("\n".join(ours[-3:]) or printed[-2000:])
        # Only a port with a listener is connected to: a connection to another could be one to itself.
        if is_listening(port) and _healthy(url):
            return
        if now - told >= _TELL_SECONDS:
            told = now
            on_wait(now - began, _last_line(log))
        time.sleep(_BETWEEN_SECONDS)
    raise StartError(f"not ready after {seconds:.0f} s; the server's last words:\n{_printed(log)[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        # What it has started ends with it, however it ends.
        process.kill()
        process.wait()


def _healthy(url: str) -> bool:
    try:
        # The certificate is this server's own; who uses the server checks it.
        return httpx.get(f"{url}/health", timeout=_QUESTION, verify=False, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _printed(log: int) -> str:
    return Path(f"/proc/self/fd/{log}").read_text(errors="replace")


def _last_line(log: int) -> str:
    lines = [line.strip() for line in _printed(log)[-4000:].splitlines() if line.strip()]
    return lines[-1][:200] if lines else "nothing yet"


def _warn(seconds: float, line: str) -> None:
    logger.warning("the server is still starting after %.0f s; its last words: %s", seconds, line)
