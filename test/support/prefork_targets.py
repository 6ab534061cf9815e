"""What the processes of ``test_prefork`` do: importable, so that a spawned process finds it too."""

from __future__ import annotations

import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

from asyncep_sgl.process.prefork import PreforkContext


def answer(pipe: Connection, status: int = 0) -> None:
    """Sends what kind of process this is, then ends with ``status`` when told to."""
    pipe.send(
        {
            "forked": "marker_of_the_parent" in sys.modules,
            "imported": "sglang.srt.managers.data_parallel_controller" in sys.modules,
            "parent": os.getppid(),
            "MOOD": os.environ.get("MOOD"),
            "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "descriptors": len(os.listdir("/proc/self/fd")),
        }
    )
    pipe.recv()
    sys.exit(status)


def wait(pipe: Connection) -> None:
    """Says that it runs, then does nothing until it is killed."""
    pipe.send(True)
    signal.pause()


def ask(status: int = 0) -> tuple[dict[str, object], int]:
    """One process's answer, and its exit status."""
    context = PreforkContext()
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs, status))
    process.start()
    theirs.close()
    found: dict[str, object] = ours.recv()
    ours.send("end")
    process.join()
    ours.close()
    assert process.exitcode is not None
    return found, process.exitcode


def with_children(pipe: Connection) -> None:
    """A process whose own processes are forked too: answers of three of them, which were forked one after the other."""
    pipe.send((os.getpid(), [ask()[0] for _ in range(3)]))
