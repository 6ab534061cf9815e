"""``asyncep classify``: labels the rows of a file."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from asyncep.client.errors import OptionError, RejectedError, ServerError
from asyncep.cluster.ray_nodes import open_ray_session
from asyncep.commands.classify_flags import STREAM, in_flags, job_of, most_errors, parser
from asyncep.files.kinds import InputError
from asyncep.jobs.estimate import Estimate
from asyncep.jobs.journal import JobError
from asyncep.jobs.peak import measure_peak
from asyncep.jobs.progress import shown_progress
from asyncep.jobs.report import figures_of, text_report
from asyncep.jobs.run import run_job
from asyncep.jobs.spec import JobResult, JobSpec
from asyncep.local_server import StartError, local_server
from asyncep.tasks.session import Session, open_session
from asyncep_router.errors import ConfigError
from asyncep_router.keys import key_from


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        0 when every row was tried and no more had errors than `--max-errors`, 1 when the server failed on the way or
        too many rows had errors, 2 for a command line or files that cannot be used, 130 and 143 when it was stopped.
    """
    options = parser().parse_args(arguments)
    console = Console(stderr=True)
    stopped = _Stopped()
    try:
        with (
            stopped.listening(),
            tempfile.TemporaryDirectory(prefix="asyncep-") as scratch,
            job_of(options, Path(scratch)) as spec,
        ):
            result, peak = _do(options, spec, console)
            return _tell(options, result, peak)
    except OptionError as error:
        print(f"asyncep classify: {in_flags(str(error), options)}", file=sys.stderr)
        return 2
    except (InputError, JobError, ConfigError, FileNotFoundError) as error:
        print(f"asyncep classify: {error}", file=sys.stderr)
        return 2
    except (ServerError, StartError, RejectedError) as error:
        print(f"asyncep classify: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read standard output has enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, sqlite3.OperationalError) as error:
        print(f"asyncep classify: {error}; what is done is kept, the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        lost = options.output == STREAM
        console.print(
            "stopped; nothing is kept of a job that writes to standard output"
            if lost
            else "stopped; what is done is kept, the same command goes on"
        )
        return 128 + stopped.by


def _do(options: argparse.Namespace, spec: JobSpec, console: Console) -> tuple[JobResult, float | None]:
    """Does the job, on a server of its own if none was named; also the peak FLOPs a second where they are known."""
    for source in (spec.source, spec.calibration):
        if source is not None:
            source.check()
    peak = options.peak_tflops * 1e12 if options.peak_tflops else None
    ranks = options.dp_size or 1
    flags = ["--dp-size", str(ranks), "--log-level", "warning"]
    with contextlib.ExitStack() as stack:
        url = options.url
        if not url and not options.ray_address:
            peak = peak or measure_peak()
            console.print(f"starting {ranks} rank(s) of {options.model_path} …")
            url = stack.enter_context(
                local_server(
                    options.model_path,
                    flags,
                    on_wait=lambda seconds, line: console.print(
                        f"still starting after {seconds:.0f} s: {line}", markup=False, highlight=False
                    ),
                )
            )
        if options.ray_address:
            console.print(f"starting {ranks} rank(s) of {options.model_path} on each host …")
            opening = open_ray_session(
                options.ray_address, options.model_path, nodes=options.ray_nodes, arguments=flags
            )
        else:
            opening = open_session(url, api_key=key_from(options.api_key, "ASYNCEP_API_KEY"))
        return asyncio.run(_run(replace(spec, peak=peak), opening, console)), peak


async def _run(spec: JobSpec, opening: contextlib.AbstractAsyncContextManager[Session], console: Console) -> JobResult:
    def tell(estimate: Estimate) -> None:
        console.print(estimate.in_words(spec.peak), markup=False, highlight=False, soft_wrap=True)

    async with opening as session:
        with shown_progress(console, spec.source.count, spec.peak) as shown:
            return await run_job(spec, session, on_progress=shown.tell, on_begin=tell)


def _tell(options: argparse.Namespace, result: JobResult, peak: float | None) -> int:
    """Prints what the job came to, its rows too if they go to standard output; the exit status."""
    out = sys.stdout
    if options.output == STREAM:
        with result.output.open("rb") as rows:
            shutil.copyfileobj(rows, sys.stdout.buffer)
        sys.stdout.flush()
        out = sys.stderr
    summary = result.summary
    if summary.accuracy is not None and not summary.multi:
        Console(file=out).print(summary.table())
    for line in text_report(result, peak):
        print(line, file=out)
    where = "standard output" if options.output == STREAM else options.output
    print(f"{summary.rows} rows, {summary.errors} with errors, written to {where}", file=out)
    if result.report:
        print(f"report: {result.report}", file=out)
    print(json.dumps(figures_of(result, peak)), file=out)
    if summary.rows and summary.errors == summary.rows:
        print("asyncep classify: no row could be labelled; OUT has the reason of each", file=sys.stderr)
        return 1
    if summary.errors > most_errors(options.max_errors, summary.rows):
        print(
            f"asyncep classify: {summary.errors} of {summary.rows} rows have errors, more than "
            f"--max-errors {options.max_errors}; OUT has the reason of each",
            file=sys.stderr,
        )
        return 1
    return 0


class _Stopped:
    """Takes SIGTERM for Ctrl-C: the job ends in order, and its server with it.

    Attributes:
        by: the signal that came.
    """

    def __init__(self) -> None:
        self.by: int = signal.SIGINT

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listens for the length of the block, where signals can be listened to."""
        try:
            before = signal.signal(signal.SIGTERM, self._stop)
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.by = number
        signal.raise_signal(signal.SIGINT)
