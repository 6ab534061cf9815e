"""A job as it is asked for, how far it is, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asyncep.files.kinds import FileFormat
from asyncep.files.rows import RowSource
from asyncep.files.wording import Wording
from asyncep.jobs.journal import journal_folder
from asyncep.jobs.outputs import OutputFormat, output_format
from asyncep.own_files import Named, check_apart, check_free
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
        form: what is written; by default what the output's name says.
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
    form: FileFormat | None = None

    @property
    def words(self) -> Wording:
        """What the caller calls the arguments."""
        return self.source.words

    @property
    def format(self) -> FileFormat:
        """What is written.

        Raises:
            InputError: the output's name does not say it, and nobody else does.
        """
        return self.form or FileFormat.of(self.output, to_write=True)

    def rows_as(self, types: Mapping[str, Any] | None = None) -> OutputFormat:
        """How rows are written.

        Args:
            types: Arrow's types of the kept fields (`RowSource.kept_types`).

        Raises:
            InputError: a kept field is called as one of the output's own.
        """
        return output_format(
            self.format,
            self.options,
            gold=self.source.gold_field is not None,
            keep=self.source.keep,
            types=types,
            argument=self.words.keep,
        )

    @property
    def writes(self) -> list[Named]:
        """Every file that the job leaves. What it makes on the way lies in the journal's folder, or is hidden by it."""
        report = [(self.words.report, self.report)] if self.report else []
        return [(self.words.output, self.output), *report]

    def check_files(self) -> None:
        """Refuses paths that would write over what is read, over another's file, or into a folder that is not there.

        Raises:
            OutputError: names the argument and the fix.
        """
        words = self.words
        calibration = [(words.calibration, self.calibration.path)] if self.calibration else []
        reads = [(words.source, self.source.path), *calibration, *self.reads]
        folder = journal_folder(self.output)
        check_apart(self.writes, reads, [folder])
        for flag, path in self.writes:
            # A job that was begun may have put its output there; `run_job` asks its journal.
            check_free(flag, path, overwrite=self.overwrite or folder.is_dir(), fix=words.overwrite)

    def settings(self, model: str, most_tokens: int | None = None) -> dict[str, Any]:
        """All that decides what the output is.

        Args:
            most_tokens: how many a prompt may have, on which depends what of a text is cut.
        """
        options = self.options
        return {
            "model": model,
            "input": self.source.facts(),
            "read as": asdict(self.source.options),
            "fields": [self.source.text_field, self.source.gold_field, *self.source.keep],
            "limit": self.source.limit,
            "shard": list(self.source.shard),
            "labels": list(options.labels),
            "descriptions": dict(options.descriptions),
            "words": {label: list(words) for label, words in options.words.items()},
            "several labels a row": options.multi_label,
            "thresholds": {label: options.threshold_of(label) for label in options.labels}
            if options.multi_label
            else None,
            "other": [options.other, options.other_below],
            "truncate": [options.truncate, most_tokens] if options.truncate else None,
            "template": options.prompt,
            "examples": [list(example) for example in options.examples],
            "calibration": self.calibration.facts() if self.calibration else list(options.calibrate),
            "chat": [options.chat, options.system],
            "length": options.length,
            "rows in a part": self.part_rows,
            "format": str(self.format),
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
        report: the HTML report; None for none.
    """

    summary: Summary
    runs: list[dict[str, float]]
    settings: dict[str, Any]
    output: Path
    report: Path | None = None

    def __repr__(self) -> str:
        found = self.summary
        right = "" if found.accuracy is None else f", accuracy {found.accuracy:.3f}"
        return f"<JobResult: {found.rows:,} rows, {found.errors:,} errors{right}; {self.output}>"

    def total(self, figure: str) -> float:
        """A figure added up over the runs."""
        return sum(run.get(figure, 0.0) for run in self.runs)
