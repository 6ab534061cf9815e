"""Ends this process when the launcher ends, however that happens."""

from __future__ import annotations

import os
import select
import threading


def die_with(pid: int) -> None:
    """Starts a thread that ends this process as soon as process ``pid`` is gone; it sleeps until then.

    A kill -9 of the launcher runs none of its code, so each process has to notice by itself.
    """
    try:
        launcher = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        poll = select.poll()
        poll.register(launcher, select.POLLIN)
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, name="asyncep-lifeline", daemon=True).start()
