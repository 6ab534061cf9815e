"""A job as it is asked for, how far it is, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncep.jobs.journal import journal_folder
from asyncep.own_files import Named, check_apart, check_free
from asyncep.tasks.rows import RowSource
from asyncep.tasks.summary import Summary
from asyncep.tasks.task import TaskOptions


@dataclass(frozen=True)
class JobSpec:
    """What is to be done.

    Attributes:
        source: the rows.
        output: the file to write; its folder ``OUTPUT.job`` is there until the job is done.
        options: labels, prompt, calibration.
        calibration: a file of neutral texts in place of ``options.calibrate``.
        part_rows: rows planned together, and written together.
        restart: forget what an earlier run has done.
        report: where to write the HTML report; None for none.
        peak: FLOPs a second at best of what it runs on, for the report's MFU.
        overwrite: write over an output and a report that are there already; never over what is read.
        reads: (argument, path) of what the caller has read besides, such as a file of examples: not to be written over.
    """

    source: RowSource
    output: Path
    options: TaskOptions
    calibration: RowSource | None = None
    part_rows: int = 4096
    restart: bool = False
    report: Path | None = None
    peak: float | None = None
    overwrite: bool = False
    reads: tuple[Named, ...] = ()

    @property
    def writes(self) -> list[Named]:
        """Every file that the job leaves. What it makes on the way lies in the journal's folder, or is hidden by it."""
        report = [("--report", self.report)] if self.report else []
        return [("OUT", self.output), *report]

    def check_files(self) -> None:
        """Refuses paths that would write over what is read, over another's file, or into a folder that is not there.

        Raises:
            OutputError: names the argument and the fix.
        """
        calibration = [("--calibration", self.calibration.path)] if self.calibration else []
        reads = [("IN", self.source.path), *calibration, *self.reads]
        folder = journal_folder(self.output)
        check_apart(self.writes, reads, [folder])
        for flag, path in self.writes:
            # A job that was begun may have put its output there; `run_job` asks its journal.
            check_free(flag, path, overwrite=self.overwrite or folder.is_dir())

    def settings(self, model: str) -> dict[str, Any]:
        """All that decides what the output is."""
        options = self.options
        return {
            "model": model,
            "input": file_facts(self.source.path),
            "fields": [self.source.text_field, self.source.gold_field, *self.source.keep],
            "limit": self.source.limit,
            "shard": list(self.source.shard),
            "labels": list(options.labels),
            "template": options.template,
            "examples": [list(example) for example in options.examples],
            "calibration": file_facts(self.calibration.path) if self.calibration else list(options.calibrate),
            "chat": [options.chat, options.system],
            "length": options.length,
            "rows in a part": self.part_rows,
            "format": self.output.suffix.lower(),
        }


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        rows: rows with a result, those of earlier runs among them.
        new_rows: those of this run.
        seconds: since this run's first row was read.
        cached_share: share of this run's tokens that came from the prefix cache.
        flops_per_second: net FLOPs of this run by its seconds; 0 where the model's shape is not known.
    """

    rows: int = 0
    new_rows: int = 0
    seconds: float = 0.0
    cached_share: float = 0.0
    flops_per_second: float = 0.0

    @property
    def rate(self) -> float:
        """Rows a second of this run."""
        return self.new_rows / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class JobResult:
    """A job that is done.

    Attributes:
        summary: counts over all rows.
        runs: figures of each run (processes that worked on the job): seconds, rows, prompts (distinct ones computed),
            tokens, cached, possible_cached, flops, full_flops.
        settings: see `JobSpec.settings`.
        output: the file.
    """

    summary: Summary
    runs: list[dict[str, float]]
    settings: dict[str, Any]
    output: Path

    def total(self, figure: str) -> float:
        """A figure added up over the runs."""
        return sum(run.get(figure, 0.0) for run in self.runs)


def file_facts(path: Path) -> list[Any]:
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]
