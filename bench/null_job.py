"""A job without a model, in a process of its own, so that its memory can be watched and it can be killed.

    python bench/null_job.py IN OUT TOKENIZER_FOLDER [URL]

Without URL the answers are made in this process. Prints a JSON line with rows, seconds, CPU seconds and resident bytes
ten times a second at most, and one more at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from null_generate import scores
from tokenizers import Tokenizer

from asyncep.client.plan import TokenCost
from asyncep.client.probes import Probe, Reading
from asyncep.client.server_facts import ServerFacts
from asyncep.client.tokens import LocalTokens
from asyncep.files.rows import RowSource
from asyncep.jobs.run import run_job
from asyncep.jobs.spec import JobSpec, Progress
from asyncep.tasks.session import open_session, session_with
from asyncep.tasks.task import TaskOptions

_EVERY_SECONDS = 0.1
FACTS = ServerFacts(2, True, 16, 4096, None, "null", TokenCost(), 2048)


class NullRank:
    """Answers at once."""

    async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
        await asyncio.sleep(0)
        return [Reading(scores(list(probe.ids), list(probe.next_ids)), (), 0) for probe in probes]


async def main(source: Path, output: Path, tokenizer: str, url: str | None) -> None:
    """Does the job."""
    process = psutil.Process()
    started = told = time.monotonic()

    def tell(progress: Progress, *, always: bool = False) -> None:
        nonlocal told
        if always or time.monotonic() - told > _EVERY_SECONDS:
            told = time.monotonic()
            cpu = process.cpu_times()
            line = {
                "rows": progress.rows,
                "new_rows": progress.new_rows,
                "seconds": told - started,
                "cpu_seconds": cpu.user + cpu.system,
                "resident_bytes": process.memory_info().rss,
            }
            print(json.dumps(line), flush=True)

    last = Progress()

    def keep(progress: Progress) -> None:
        nonlocal last
        last = progress
        tell(progress)

    spec = JobSpec(RowSource(source, gold_field="label"), output, TaskOptions(["yes", "no"], "Text: {text}\nAnswer:"))
    async with contextlib.AsyncExitStack() as stack:
        if url is None:
            tokens = LocalTokens(Tokenizer.from_file(f"{tokenizer}/tokenizer.json"))
            session = await stack.enter_async_context(session_with(NullRank(), tokens, FACTS))
        else:
            session = await stack.enter_async_context(open_session(url))
        result = await run_job(spec, session, on_progress=keep)
    tell(last, always=True)
    print(json.dumps({"done": result.summary.rows, "errors": result.summary.errors}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else None))
