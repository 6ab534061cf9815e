"""A job on the toy model in a process of its own, to be killed.

    python toy_job.py IN OUT [KILL_AT [report]]

With KILL_AT the process kills itself at its so-manieth durable operation (a file synchronised, named or removed, a
transaction), before it happens. Prints how far it is, and at the end how many durable operations
there were and how many prompts it asked the model for.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from toy_model import ByteTokens, ToyServer, toy_facts

from asyncep.files.rows import RowSource
from asyncep.jobs import journal
from asyncep.jobs.run import run_job
from asyncep.jobs.spec import JobSpec, Progress
from asyncep.tasks.session import session_with
from asyncep.tasks.task import TaskOptions


def die_at(operation: int) -> list[int]:
    """Kills this process at its `operation`-th durable operation; the list holds how many there were."""
    seen = [0]

    def count() -> None:
        seen[0] += 1
        if seen[0] == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count()
            return function(*args, **kwargs)

        return wrapped

    os.fsync = before(os.fsync)
    os.link = before(os.link)
    for name in ("replace", "unlink", "rmdir"):
        setattr(Path, name, before(getattr(Path, name)))

    class Connection(sqlite3.Connection):
        def __exit__(self, *args: Any) -> Any:
            count()
            return super().__exit__(*args)

    connect = sqlite3.connect
    journal.sqlite3.connect = lambda *args, **kwargs: connect(*args, factory=Connection, **kwargs)  # type: ignore[assignment]
    return seen


async def main(source: Path, output: Path, seen: list[int], *, report: bool) -> None:
    def tell(progress: Progress) -> None:
        print(progress.rows, flush=True)

    rows = RowSource(source, gold_field="gold", keep=("id",))
    options = TaskOptions(["yes", "no"], "Q: {text} A:", calibrate=("N/A",))
    page = output.with_name(output.name + ".html") if report else None
    spec = JobSpec(rows, output, options, part_rows=100, report=page)
    server = ToyServer()
    async with session_with(server, ByteTokens(), toy_facts()) as session:
        result = await run_job(spec, session, on_progress=tell)
    print("done", result.summary.rows, *seen, len(server.prompts))


if __name__ == "__main__":
    kill_at = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), die_at(kill_at), report="report" in sys.argv[4:]))
