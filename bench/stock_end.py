"""The end of a stock SGLang server that a bench has started: nothing of it is left, shared memory included."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1
_SHARED = Path("/dev/shm")
_NAMES = ("sglang_loads_*", "sgl_shm_mq_*", "sem.mp-*")


def end_with_parent() -> None:
    """To be run in the server's process before it starts: a bench that is killed leaves none behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _left() -> set[Path]:
    return {file for name in _NAMES for file in _SHARED.glob(name)}


@contextlib.contextmanager
def ended_whole(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends ``process`` and its group (it leads a session of its own) afterwards.

    However it ends, stock SGLang leaves the file of its load figures, its ranks' message queues and a semaphore, whose
    tracker it kills. What came into shared memory meanwhile under these names is removed: benches run one server at
    a time.
    """
    before = _left()
    try:
        yield
    finally:
        deadline = time.monotonic() + _SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            while time.monotonic() < deadline:
                process.poll()  # reaps it, so that the group can end
                os.killpg(process.pid, 0)
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for file in _left() - before:
            file.unlink(missing_ok=True)
