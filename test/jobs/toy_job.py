"""A job on the toy model in a process of its own, to be killed.

    python toy_job.py IN OUT [KILL_AT]

With KILL_AT the process kills itself at its so-manieth durable operation (a file synchronised or renamed, a
transaction), before it happens. Prints how far it is, and at the end how many prompts it asked the model for.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from toy_model import ByteTokens, ToyServer, toy_facts

from asyncep.classify.rows import RowSource
from asyncep.jobs import journal
from asyncep.jobs.run import JobSpec, Progress, run_job
from asyncep.runtime.session import session_with
from asyncep.runtime.task import TaskOptions


def die_at(operation: int) -> None:
    """Kills this process at its `operation`-th durable operation."""
    left = [operation]

    def count() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count()
            return function(*args, **kwargs)

        return wrapped

    os.fsync = before(os.fsync)
    Path.replace = before(Path.replace)  # type: ignore[method-assign]

    class Connection(sqlite3.Connection):
        def __exit__(self, *args: Any) -> Any:
            count()
            return super().__exit__(*args)

    connect = sqlite3.connect
    journal.sqlite3.connect = lambda *args, **kwargs: connect(*args, factory=Connection, **kwargs)  # type: ignore[assignment]


async def main(source: Path, output: Path) -> None:
    def tell(progress: Progress) -> None:
        print(progress.rows, flush=True)

    rows = RowSource(source, gold_field="gold", keep=("id",))
    spec = JobSpec(rows, output, TaskOptions(["yes", "no"], "Q: {text} A:", calibrate=("N/A",)), part_rows=100)
    server = ToyServer()
    async with session_with(server, ByteTokens(), toy_facts()) as session:
        result = await run_job(spec, session, on_progress=tell)
    print("done", result.summary.rows, len(server.prompts))


if __name__ == "__main__":
    if len(sys.argv) > 3:
        die_at(int(sys.argv[3]))
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
