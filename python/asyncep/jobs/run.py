"""A job from file to file: windows of rows are read, planned as a whole, computed, written as parts and joined."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from asyncep.client.errors import OptionError
from asyncep.files.rows import Row
from asyncep.jobs.estimate import Estimate, estimated
from asyncep.jobs.journal import JobError, Journal, digest_of, open_journal
from asyncep.jobs.outputs import OutputFormat, join_parts
from asyncep.jobs.spec import JobResult, JobSpec, Progress
from asyncep.own_files import check_free, identity, put_in_place
from asyncep.tasks.gold import as_label, label_text
from asyncep.tasks.results import Classification
from asyncep.tasks.session import Session
from asyncep.tasks.summary import Summary
from asyncep.tasks.task import Task, TextScores

logger = logging.getLogger("asyncep")

# Answers are kept at least so often: what a kill costs at most.
_KEEP_SECONDS = 1.0
_WINDOWS_UNDER_WAY = 2
# Places in `JobSpec.writes`, and the keys under which the journal knows the job's own files.
_OUTPUT, _REPORT = 0, 1
_WRITTEN = ("written output", "written report")


OnProgress = Callable[[Progress], None]
OnBegin = Callable[[Estimate], None]


async def run_job(
    spec: JobSpec,
    session: Session,
    *,
    on_progress: OnProgress | None = None,
    on_begin: OnBegin | None = None,
) -> JobResult:
    """Does the job, or what is left of it.

    Args:
        on_progress: told after each batch and each part.
        on_begin: told what it will cost, as soon as the rows are counted.

    Raises:
        InputError: the input cannot be used.
        OutputError: the output or the report cannot be written where they should.
        JobError: the job's folder cannot be used, or the input changed on the way.
        ServerError: the server failed; what is done is kept.
    """
    spec.rows_as()
    spec.check_files()
    await asyncio.to_thread(spec.source.check)
    form = spec.rows_as(await asyncio.to_thread(spec.source.kept_types))
    settings = spec.settings(session.facts.model, session.facts.most_tokens)
    words = spec.words
    with open_journal(spec.output, settings, restart=spec.restart, fix=words.restart) as journal:
        for number, (flag, path) in enumerate(spec.writes):
            check_free(flag, path, overwrite=spec.overwrite, own=journal.get(_WRITTEN[number]), fix=words.overwrite)
        if not _is_own(journal, _OUTPUT, spec.output):
            task = await _task(spec, session, journal)
            estimate = asyncio.create_task(_estimate(spec, session, task, on_begin)) if on_begin else None
            try:
                await _Job(spec, session, task, journal, form, on_progress or _nothing).run()
            finally:
                if estimate is not None:
                    estimate.cancel()
                    await asyncio.gather(estimate, return_exceptions=True)
            await asyncio.to_thread(_check_whole, spec, settings, journal)
            parts = [journal.part_path(number) for number in sorted(journal.done)]
            await asyncio.to_thread(join_parts, journal.joined_path, parts, form, spec.format)
            _put(journal, _OUTPUT, journal.joined_path, spec)
        outcomes, multi = spec.options.outcomes, spec.options.multi_label
        summary = Summary(outcomes, multi=multi)
        for counts in journal.counts():
            summary.merge(Summary.from_json(outcomes, counts, multi=multi))
        result = JobResult(summary, journal.figures(), settings, spec.output, spec.report)
        if spec.report:
            await asyncio.to_thread(_report, journal, result, spec)
        journal.finished = True
    return result


async def _estimate(spec: JobSpec, session: Session, task: Task, on_begin: OnBegin) -> None:
    on_begin(await estimated(spec.source, await asyncio.to_thread(spec.source.count), session, task))


def _is_own(journal: Journal, number: int, path: Path) -> bool:
    """Whether what stands there is this job's, from a run that was killed afterwards."""
    found = identity(path)
    return found is not None and found == journal.get(_WRITTEN[number])


def _put(journal: Journal, number: int, unfinished: Path, spec: JobSpec) -> None:
    spec.check_files()
    journal.put(_WRITTEN[number], identity(unfinished))
    flag, path = spec.writes[number]
    put_in_place(flag, unfinished, path, overwrite=spec.overwrite, fix=spec.words.overwrite)


def _report(journal: Journal, result: JobResult, spec: JobSpec) -> None:
    # Imported late: matplotlib and Jinja take a second.
    from asyncep.jobs.report import html_report

    assert spec.report is not None
    # The report may belong on another file system than the output, so it cannot wait in the journal's folder.
    unfinished = spec.report.with_name(f".{spec.report.name}.{journal.name}.tmp")
    if not _is_own(journal, _REPORT, spec.report):
        unfinished.write_text(html_report(result, spec.peak), encoding="utf-8")
        _put(journal, _REPORT, unfinished, spec)
    unfinished.unlink(missing_ok=True)


def _check_whole(spec: JobSpec, settings: dict[str, Any], journal: Journal) -> None:
    """Holds the rows that were written against those of the input, which must be what it was at the start."""
    fix = f"give {spec.words.restart} to begin anew"
    if spec.source.facts() != settings["input"]:
        raise JobError(f"{spec.source.path}: has changed while the job ran; {fix}")
    written, there = sum(counts["rows"] for counts in journal.counts()), spec.source.count()
    if written != there:
        raise JobError(f"{spec.source.path}: has {there} rows, and {written} were written; {fix}")


async def _task(spec: JobSpec, session: Session, journal: Journal) -> Task:
    """The task; a calibration measured by an earlier run is taken over, so that all rows have the same."""
    offsets = journal.get("offsets")
    options = spec.options
    if offsets is not None:
        return replace(await session.prepare(replace(options, calibrate=())), offsets=tuple(offsets))
    if spec.calibration is not None:
        spec.calibration.check()
        rows = list(spec.calibration.rows())
        texts = tuple(row.text for row in rows if row.text is not None)
        if not texts:
            raise OptionError(f"{spec.words.calibration} {spec.calibration.path}: no row has a text")
        if bad := [row for row in rows if row.text is None]:
            told = f"{len(bad)} of {len(rows)} rows are left out, the first of them row {bad[0].number}: {bad[0].error}"
            logger.warning("%s %s: %s", spec.words.calibration, spec.calibration.path, told)
        options = replace(options, calibrate=texts)
    try:
        task = await session.prepare(options)
    except OptionError as error:
        if spec.calibration is None or not str(error).startswith("calibrate:"):
            raise
        raise OptionError(f"{spec.words.calibration} {spec.calibration.path}{str(error)[len('calibrate') :]}") from None
    journal.put("offsets", task.offsets)
    return task


@dataclass(eq=False)
class _Window:
    """A window under way: its scores by text, and whether they are all there."""

    scores: dict[str, TextScores | str] = field(default_factory=dict)
    done: asyncio.Event = field(default_factory=asyncio.Event)


class _Job:
    """One run of a job."""

    def __init__(
        self, spec: JobSpec, session: Session, task: Task, journal: Journal, form: OutputFormat, on_progress: OnProgress
    ) -> None:
        self._spec, self._session, self._task = spec, session, task
        self._journal, self._form, self._on_progress = journal, form, on_progress
        self._progress = Progress()
        self._started = self._kept = time.monotonic()
        self._answers: list[tuple[bytes, Sequence[float]]] = []
        # One at a time uses the database; they do it in threads, for it waits for the disk.
        self._database = asyncio.Lock()
        self._keeping: asyncio.Task[None] | None = None
        self._computing: dict[bytes, _Window] = {}

    async def run(self) -> None:
        # Calibration is not the job's work.
        self._session.scorer.reset_totals()
        done = self._journal.done
        self._progress.rows = sum(counts["rows"] for counts in self._journal.counts())
        windows = self._spec.source.windows(self._spec.part_rows, done)
        self._tell()
        under_way: deque[asyncio.Task[None]] = deque()
        try:
            while (window := await asyncio.to_thread(_next, windows)) is not None:
                under_way.append(asyncio.create_task(self._window(*window)))
                if len(under_way) == _WINDOWS_UNDER_WAY:
                    await under_way.popleft()
            while under_way:
                await under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            # Also when the server failed or the user has stopped it: what was answered is kept.
            await self._keep()

    async def _window(self, number: int, rows: list[Row]) -> None:
        window = _Window()
        digests: dict[str, bytes] = {}
        copies: dict[str, int] = {}
        for row in rows:
            if row.text is not None:
                copies[row.text] = copies.get(row.text, 0) + 1
                if copies[row.text] == 1:
                    digests[row.text] = digest_of(row.text)
        scores = window.scores
        async with self._database:
            known = await asyncio.to_thread(self._journal.known, list(digests.values()))
        # Without a pause between looking and noting: two windows may hold the same text, and the first computes it.
        elsewhere = {text: self._computing[digest] for text, digest in digests.items() if digest in self._computing}
        missing = []
        for text, digest in digests.items():
            if digest in known:
                scores[text] = self._known(known[digest])
            elif text not in elsewhere:
                missing.append(text)
                self._computing[digest] = window
        self._advance(sum(copies[text] for text in scores) + sum(row.text is None for row in rows))

        def take(numbers: Sequence[int], results: Sequence[TextScores | str]) -> None:
            for i, result in zip(numbers, results, strict=True):
                scores[missing[i]] = result
                if isinstance(result, TextScores):
                    # How much of the text was cut stands behind its scores.
                    self._answers.append((digests[missing[i]], (*result.scores, result.cut)))
            self._advance(sum(copies[missing[i]] for i in numbers))
            if time.monotonic() - self._kept > _KEEP_SECONDS and (self._keeping is None or self._keeping.done()):
                self._keeping = asyncio.create_task(self._keep())

        await self._session.score_texts(missing, self._task, take, behind=True)
        window.done.set()
        for text, other in elsewhere.items():
            await other.done.wait()
            scores[text] = other.scores[text]
        self._advance(sum(copies[text] for text in elsewhere))
        content, counts = await asyncio.to_thread(self._part, rows, scores)
        await self._keep()
        for text in missing:
            del self._computing[digests[text]]
        async with self._database:
            await asyncio.to_thread(self._journal.add_part, number, content, counts, self._figures())

    def _known(self, kept: tuple[float, ...]) -> TextScores:
        """A text's scores as they were kept."""
        return TextScores(kept[:-1], cut=int(kept[-1]))

    def _part(self, rows: list[Row], scores: dict[str, TextScores | str]) -> tuple[bytes, dict[str, Any]]:
        options = self._task.options
        summary = Summary(options.outcomes, multi=options.multi_label)
        labels = frozenset(options.outcomes)
        shown, answers = [], []
        for row in rows:
            answer = Classification(None, error=row.error) if row.text is None else self._task.decide(scores[row.text])
            gold = label_text(row.gold)
            gold = gold if options.multi_label else as_label(gold, labels)
            answers.append(answer)
            shown.append(replace(row, gold=gold))
            summary.add_answer(row.number, row.text, gold, answer)
        return self._form.part(shown, answers), summary.as_json()

    async def _keep(self) -> None:
        answers, self._answers = self._answers, []
        self._kept = time.monotonic()
        async with self._database:
            await asyncio.to_thread(self._journal.remember, answers, self._figures())

    def _advance(self, rows: int) -> None:
        self._progress.rows += rows
        self._progress.new_rows += rows
        self._tell()

    def _tell(self) -> None:
        totals = self._session.scorer.totals
        progress = self._progress
        progress.seconds = time.monotonic() - self._started
        progress.cached_share = totals.cached_share
        progress.flops_per_second = totals.flops / progress.seconds if progress.seconds else 0.0
        self._on_progress(progress)

    def _figures(self) -> dict[str, float]:
        totals = self._session.scorer.totals
        return {
            "seconds": time.monotonic() - self._started,
            "rows": self._progress.new_rows,
            "prompts": totals.prompts,
            "tokens": totals.tokens,
            "cached": totals.cached,
            "possible_cached": totals.possible_cached,
            "flops": totals.flops,
            "full_flops": totals.full_flops,
        }


def _next(windows: Iterator[tuple[int, list[Row]]]) -> tuple[int, list[Row]] | None:
    return next(windows, None)


def _nothing(_: Progress) -> None:
    pass
