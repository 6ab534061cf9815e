"""Ends this process when the launcher ends, however that happens."""

from __future__ import annotations

import os
import select
import threading

_launchers: list[int] = []


def die_with(pid: int) -> None:
    """Starts a thread that ends this process as soon as process ``pid`` is gone; it sleeps until then.

    A kill -9 of the launcher runs none of its code, so each process has to notice by itself. A process that is forked
    from this one has a thread of its own for it.
    """
    try:
        launcher = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)
    _launchers.append(launcher)
    _watch(launcher)
    os.register_at_fork(after_in_child=lambda: _watch(launcher))


def threads() -> int:
    """How many threads of this process only sleep here."""
    return len(_launchers)


def _watch(launcher: int) -> None:
    def watch() -> None:
        poll = select.poll()
        poll.register(launcher, select.POLLIN)
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, name="asyncep-lifeline", daemon=True).start()
