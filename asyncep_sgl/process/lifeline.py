"""Ends this process when the launcher ends, however that happens."""

from __future__ import annotations

import os
import select
import shutil
import threading

# By process: its descriptor, and the folder that goes with it.
_launchers: dict[int, tuple[int, str]] = {}


def die_with(pid: int, directory: str = "") -> None:
    """Starts a thread that ends this process as soon as process ``pid`` is gone; it sleeps until then.

    A kill -9 of the launcher runs none of its code, so each process has to notice by itself. A process that is forked
    from this one has a thread of its own for it. A second call for the same process does nothing.

    Args:
        pid: the launcher.
        directory: its private folder, which nobody else is left to remove; empty for none.
    """
    if pid in _launchers:
        return
    try:
        launcher = os.pidfd_open(pid)
    except ProcessLookupError:
        _end(directory)
    _launchers[pid] = (launcher, directory)
    _watch(launcher, directory)
    os.register_at_fork(after_in_child=lambda: _watch(launcher, directory))


def threads() -> int:
    """How many threads of this process only sleep here."""
    return len(_launchers)


def _watch(launcher: int, directory: str) -> None:
    def watch() -> None:
        poll = select.poll()
        poll.register(launcher, select.POLLIN)
        poll.poll()
        _end(directory)

    threading.Thread(target=watch, name="asyncep-lifeline", daemon=True).start()


def _end(directory: str) -> None:
    if directory:
        # Every process of the run does so; the last one leaves nothing.
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)
