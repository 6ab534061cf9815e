"""``python -m asyncep.leashed PID COMMAND …``: an ``asyncep`` command that is told to stop when process PID ends.

A server started by a program has to end with it, however it ends: a kill -9 runs none of the program's code.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading

from asyncep.cli import main


def stop_with(pid: int) -> None:
    """Starts a thread that sends this process SIGTERM as soon as process `pid` is gone; it sleeps until then."""
    try:
        owner = os.pidfd_open(pid)
    except ProcessLookupError:
        raise SystemExit(f"process {pid}, which this server is for, has ended") from None

    def watch() -> None:
        poll = select.poll()
        poll.register(owner, select.POLLIN)
        poll.poll()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="asyncep-leash", daemon=True).start()


if __name__ == "__main__":
    stop_with(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
