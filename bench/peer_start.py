"""The start of a server that is no product of ours: its command, until it answers, to its whole end."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import httpx
from stock_end import end_with_parent, ended_whole

FLUSH_SECONDS = 30.0


@contextlib.contextmanager
def answering(name: str, command: Sequence[str], port: int, environment: Mapping[str, str]) -> Iterator[str]:
    """Runs `command`; yields the server's URL once its `/health` answers 200.

    Raises:
        RuntimeError: it ended before; with `name` and the end of what it printed.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent
        )
        with ended_whole(process):
            url = f"http://127.0.0.1:{port}"
            await_answer(name, process, log, url)
            yield url


def await_answer(name: str, process: subprocess.Popen[bytes], log: IO[bytes], url: str) -> None:
    """Returns once `/health` answers 200.

    Raises:
        RuntimeError: `process` ended before; with `name` and the end of its `log`.
    """
    while True:
        if process.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"{name} did not start:\n{log.read()[-3000:].decode(errors='replace')}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=30).status_code == 200:
                return
        # A start has no event to wait for but its answer.
        time.sleep(0.25)


# Of servers on emulated hosts, which this machine's programs reach from another address than loopback.
ADMIN_KEY = "of-a-bench"


def flush_cache(url: str) -> None:
    """Empties a server's or router's caches. SGLang refuses until a rank has seen that it is idle, a moment after its
    last reply.

    Raises:
        httpx.HTTPStatusError: it still refuses after 30 s.
    """
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    deadline = time.monotonic() + FLUSH_SECONDS
    while (answer := httpx.post(f"{url}/flush_cache", headers=headers, timeout=60)).is_error:
        if time.monotonic() > deadline:
            answer.raise_for_status()
        time.sleep(0.2)
