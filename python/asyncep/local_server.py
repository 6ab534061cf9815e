"""A server of our own for the length of a job: started, waited for, stopped, whatever happens in between.

It is a process of its own, on a leash (`asyncep.leashed`): should this process be killed, it stops by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx


class StartError(RuntimeError):
    """The server did not come up; carries the end of what it printed."""


@contextlib.contextmanager
def local_server(model: str, arguments: Sequence[str] = (), *, start_seconds: float = 600) -> Iterator[str]:
    """``asyncep serve`` on a free port of this host; yields its URL.

    Args:
        model: checkpoint folder or hub name.
        arguments: further flags of ``asyncep serve``.

    Raises:
        StartError: it ended or was not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "asyncep.leashed",
        str(os.getpid()),
        "serve",
        "--model-path",
        model,
        "--port",
        str(port),
        *arguments,
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ)
        try:
            _wait_until_ready(process, port, log.fileno(), start_seconds)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            printed = Path(f"/proc/self/fd/{log}").read_text(errors="replace")
            # Our own lines carry the reason; SGLang's traceback stands above them.
            ours = [line for line in printed.splitlines() if line.startswith("asyncep")]
            raise StartError("\n".join(ours[-3:]) or printed[-2000:])
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code == 200:
                return
        time.sleep(0.25)
    raise StartError(f"not ready after {seconds:.0f} s")
