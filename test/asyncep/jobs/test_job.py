"""Jobs on a toy model: formats, shards, limits, duplicates, settings, reports."""

from __future__ import annotations

import asyncio
import csv
import fcntl
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from toy_model import ByteTokens, ToyServer, toy_facts

from asyncep.files.kinds import ReadOptions
from asyncep.files.rows import InputError, RowSource
from asyncep.jobs import progress as progress_module
from asyncep.jobs.estimate import Estimate
from asyncep.jobs.journal import JobError, digest_of, open_journal
from asyncep.jobs.peak import measure_peak
from asyncep.jobs.progress import figures, shown_progress
from asyncep.jobs.report import figures_of, settings_in_words, text_report
from asyncep.jobs.run import run_job
from asyncep.jobs.spec import JobResult, JobSpec, Progress
from asyncep.tasks.notable import Notable
from asyncep.tasks.results import Classification
from asyncep.tasks.session import session_with
from asyncep.tasks.summary import Summary
from asyncep.tasks.task import TaskOptions

OPTIONS = TaskOptions(["yes", "no"], "Q: {text} A:")


def do(spec: JobSpec, server: ToyServer | None = None, **told: Any) -> JobResult:
    async def run() -> JobResult:
        async with session_with(server or ToyServer(), ByteTokens(), toy_facts()) as session:
            return await run_job(spec, session, **told)

    return asyncio.run(run())


def table(rows: int) -> polars.DataFrame:
    return polars.DataFrame(
        {
            "id": [f"#{i}" for i in range(rows)],
            "text": [f"text {i}" if i % 50 != 7 else "" for i in range(rows)],
            "gold": ["yes" if i % 3 else "no" for i in range(rows)],
        }
    )


def write(frame: polars.DataFrame, path: Path) -> Path:
    {".jsonl": frame.write_ndjson, ".csv": frame.write_csv, ".parquet": frame.write_parquet}[path.suffix](path)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Every kind of output as flat records."""
    if path.suffix == ".parquet":
        return polars.read_parquet(path).to_dicts()
    if path.suffix == ".csv":
        with path.open(newline="") as lines:
            return [
                {
                    k: None if v == "" else int(v) if k == "row" else float(v) if k[0] == "p" or "logp" in k else v
                    for k, v in row.items()
                }
                for row in csv.DictReader(lines)
            ]
    records = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        probabilities = record.pop("probabilities", {})
        logs = record.pop("log_probabilities", {})
        record["probability"] = probabilities.get(record.get("label"))
        for label in OPTIONS.labels:
            record[f"p_{label}"], record[f"logp_{label}"] = probabilities.get(label), logs.get(label)
        records.append({"error": None, "label": None, **record})
    return records


@pytest.mark.parametrize("kind_in", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("kind_out", [".jsonl", ".csv", ".parquet"])
def test_every_format_to_every_format(tmp_path: Path, kind_in: str, kind_out: str) -> None:
    source = write(table(130), tmp_path / f"in{kind_in}")
    output = tmp_path / f"out{kind_out}"
    result = do(JobSpec(RowSource(source, gold_field="gold", keep=("id",)), output, OPTIONS, part_rows=40))
    reference = tmp_path / "reference.jsonl"
    do(JobSpec(RowSource(write(table(130), tmp_path / "r.jsonl"), gold_field="gold", keep=("id",)), reference, OPTIONS))
    records = read(output)
    assert [record["row"] for record in records] == list(range(130))
    assert records[5]["id"] == "#5"
    for record, expected in zip(records, read(reference), strict=True):
        assert record == expected
    assert (result.summary.rows, result.summary.errors) == (130, 3)
    assert repr(result) == f"<JobResult: 130 rows, 3 errors, accuracy {result.summary.accuracy:.3f}; {output}>"
    assert [path.name for path in tmp_path.iterdir() if ".job" in path.name or ".tmp" in path.name] == []


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 150), shards=st.integers(1, 4), limit=st.none() | st.integers(0, 200), size=st.integers(1, 60)
)
def test_shards_and_parts_cover_every_row_once(
    tmp_path: Path, rows: int, shards: int, limit: int | None, size: int
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}"}) + "\n\n" for i in range(rows)))
    wanted = list(range(rows if limit is None else min(rows, limit)))
    numbers = []
    for shard in range(shards):
        source = RowSource(path, limit=limit, shard=(shard, shards))
        windows = dict(source.windows(size))
        mine = [row.number for window in windows.values() for row in window]
        assert source.count() == len(mine)
        assert all(len(window) <= size for window in windows.values())
        # Passing over finished parts leaves the others as they were.
        skipped = dict(source.windows(size, done={0, 2}))
        assert skipped == {number: window for number, window in windows.items() if number not in (0, 2)}
        numbers += mine
    assert sorted(numbers) == wanted


def test_a_text_is_computed_once_whereever_it_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i % 70}"}) + "\n" for i in range(700)))
    server = ToyServer()
    result = do(JobSpec(RowSource(path), tmp_path / "out.jsonl", OPTIONS, part_rows=50), server)
    firsts = [p for p in server.prompts if bytes(p).endswith(b"A:")]
    assert len(firsts) == len(set(firsts)) == 70
    assert result.total("prompts") == 70
    assert result.summary.rows == 700
    labels = [record["label"] for record in read(tmp_path / "out.jsonl")]
    assert labels == labels[:70] * 10


def test_an_unfinished_job_is_gone_on_with_only_under_the_same_settings(tmp_path: Path) -> None:
    source = write(table(10), tmp_path / "in.jsonl")
    spec = JobSpec(RowSource(source), tmp_path / "out.jsonl", OPTIONS)
    with open_journal(spec.output, spec.settings("toy")) as journal:
        journal.add_part(
            0, b"from before\n", {"rows": 10, "errors": 0, "pairs": [], "predicted": {}, "bins": [], "reasons": {}}, {}
        )
    with pytest.raises(JobError, match=r"other settings \(labels, template\).*--restart"):
        do(replace(spec, options=TaskOptions(["a", "b"], "{text}")))
    with source.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(JobError, match=r"other settings \(input\)"):
        do(spec)
    assert do(replace(spec, restart=True)).summary.rows == 11
    assert len(read(spec.output)) == 11


def test_two_processes_do_not_work_on_one_job(tmp_path: Path) -> None:
    spec = JobSpec(RowSource(write(table(3), tmp_path / "in.jsonl")), tmp_path / "out.jsonl", OPTIONS)
    folder = tmp_path / "out.jsonl.job"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(JobError, match="another process works on this job"):
            do(spec)
    assert do(spec).summary.rows == 3


def test_a_broken_record_says_how_to_begin_anew(tmp_path: Path) -> None:
    spec = JobSpec(RowSource(write(table(3), tmp_path / "in.jsonl")), tmp_path / "out.jsonl", OPTIONS)
    folder = tmp_path / "out.jsonl.job"
    folder.mkdir()
    (folder / "state.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(JobError, match="--restart"):
        do(spec)
    assert do(replace(spec, restart=True)).summary.rows == 3


def test_journal_remembers_answers(tmp_path: Path) -> None:
    digests = [digest_of(str(i)) for i in range(1200)]
    with open_journal(tmp_path / "o", {}) as journal:
        journal.remember([(digest, [float(i), -1.5]) for i, digest in enumerate(digests[:1100])], {"rows": 1.0})
    with open_journal(tmp_path / "o", {}) as journal:
        found = journal.known(digests)
        assert len(found) == 1100
        assert found[digests[7]] == (7.0, -1.5)
        assert journal.figures() == [{"rows": 1.0}]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.xlsx", "give a .jsonl, .json, .csv, .tsv, .parquet or .arrow file to write"),
        ("gone/out.jsonl", "OUT .*: there is no folder .*gone; make it, or correct the path"),
    ],
)
def test_outputs(tmp_path: Path, name: str, words: str) -> None:
    spec = JobSpec(RowSource(write(table(3), tmp_path / "in.jsonl")), tmp_path / name, OPTIONS)
    with pytest.raises(ValueError, match=words):
        do(spec)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_kept_fields_do_not_collide(tmp_path: Path) -> None:
    source = RowSource(write(table(3), tmp_path / "in.jsonl"), keep=("label",))
    with pytest.raises(InputError, match="--keep: the output has a column label"):
        do(JobSpec(source, tmp_path / "out.csv", OPTIONS))


def test_progress_and_report(tmp_path: Path) -> None:
    seen: list[int] = []
    source = RowSource(write(table(200), tmp_path / "in.jsonl"), gold_field="gold")
    page = tmp_path / "report.html"

    def tell(progress: Progress) -> None:
        seen.append(progress.rows)

    result = do(
        JobSpec(source, tmp_path / "out.jsonl", OPTIONS, part_rows=64, report=page),
        on_progress=tell,
    )
    assert seen[0] == 0
    assert seen[-1] == 200
    assert seen == sorted(seen)
    summary = result.summary
    records = [record for record in read(tmp_path / "out.jsonl") if record["label"]]
    hits = sum(record["label"] == record["gold"] for record in records)
    assert summary.accuracy == hits / len(records)
    assert sum(entry.rows for entry in summary.bins) == len(records)
    assert sum(entry.hits for entry in summary.bins) == hits
    figures = figures_of(result)
    assert figures["accuracy"] == pytest.approx(summary.accuracy, abs=1e-5)
    assert figures["rows"] == 200
    assert "flops" not in figures
    text = page.read_text()
    for words in ("Confusion", "Calibration", "data:image/svg+xml", "&#39;text&#39; is empty", "prefix cache"):
        assert words in text
    assert "accuracy 0." in text_report(result)[0]


def test_labels_with_dollars_are_drawn_as_they_are(tmp_path: Path) -> None:
    labels = ["$\\fo$", "$5-$10"]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "gold": labels[i % 2]}) + "\n" for i in range(8)))
    page = tmp_path / "page.html"
    for multi in (False, True):
        options = TaskOptions(labels, "{text} {label}?" if multi else "{text}:", multi_label=multi)
        do(JobSpec(RowSource(path, gold_field="gold"), tmp_path / "o.jsonl", options, report=page, overwrite=True))
    assert "Precision and recall" in page.read_text()


def test_a_job_that_cuts_goes_on_only_where_it_would_cut_the_same(tmp_path: Path) -> None:
    spec = JobSpec(RowSource(write(table(3), tmp_path / "in.jsonl")), tmp_path / "o.jsonl", OPTIONS)
    assert spec.settings("m", 5) == spec.settings("m", 6)
    cutting = replace(spec, options=replace(OPTIONS, truncate="tail"))
    assert cutting.settings("m", 5) != cutting.settings("m", 6)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_what_was_cut_is_in_the_output_also_of_a_job_that_goes_on(tmp_path: Path, kind: str) -> None:
    """The second run takes the first one's answers from the journal."""
    lengths = [10, 5000, 10, 4500, 10, 6000]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in lengths))
    options = TaskOptions(["yes", "no"], "Q: {text} A:", truncate="tail")
    spec = JobSpec(RowSource(source), tmp_path / f"out{kind}", options, part_rows=2)

    def stop(progress: Progress) -> None:
        if progress.rows >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(spec, on_progress=stop)
    result = do(spec)
    assert len(result.runs) == 2
    cut = [int(record.get("cut_characters") or 0) for record in read(spec.output)]
    assert [bool(count) for count in cut] == [length > 4000 for length in lengths]

    async def whole() -> list[int]:
        async with session_with(ToyServer(), ByteTokens(), toy_facts()) as session:
            found = await session.classify(["x" * length for length in lengths], await session.prepare(options))
            return [answer.cut_characters for answer in found]

    assert cut == asyncio.run(whole())
    assert result.summary.cut == 3
    assert "3 rows were too long and were cut" in text_report(result)


def test_little_probability_of_the_labels_is_said(tmp_path: Path) -> None:
    """The toy knows 256 tokens: a label of four letters has next to nothing, one of a letter some."""
    source = write(table(20), tmp_path / "in.jsonl")
    for labels, little in ((["yes", "no"], True), ([chr(code) for code in range(97, 123)], False)):
        result = do(JobSpec(RowSource(source), tmp_path / "o.jsonl", TaskOptions(labels, "{text}\n"), overwrite=True))
        assert any("of the probability" in line for line in text_report(result)) is little
        assert result.summary.mean_mass is not None
        assert (result.summary.mean_mass < 0.01) is little


@pytest.mark.parametrize(("flops", "shown"), [(5e11, "MFU 50.0%"), (1e12, "MFU 100.0%"), (1.01e12, None), (0.0, None)])
def test_no_mfu_above_all_of_the_peak(tmp_path: Path, flops: float, shown: str | None) -> None:
    peak = 1e12
    said = figures(Progress(rows=10, seconds=2.0, flops_per_second=flops), peak)
    assert [words for words in said if words.startswith("MFU")] == ([shown] if shown else [])
    summary = Summary(["a", "b"])
    summary.rows = 10
    run = {"seconds": 2.0, "rows": 10, "tokens": 5, "flops": flops * 2, "full_flops": flops * 4}
    result = JobResult(summary, [run], {}, tmp_path / "o")
    text = "\n".join(text_report(result, peak))
    assert ("MFU" in text) == bool(flops)
    assert (shown or "no MFU: the job was faster than the peak of 1 TFLOP/s") in text or not flops
    assert ("mfu" in figures_of(result, peak)) == bool(shown)


def test_progress_comes_as_lines_while_a_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "_LINE_SECONDS", 0.0)
    out = io.StringIO()
    with shown_progress(Console(file=out), lambda: 30, None) as shown:
        for rows in (10, 20):
            shown.tell(Progress(rows=rows, seconds=1.0))
        before = out.getvalue().splitlines()
    assert len(before) == 2
    assert before[1].startswith("classifying: 20 ")
    assert len(out.getvalue().splitlines()) == 3


def test_settings_in_words(tmp_path: Path) -> None:
    """No brackets of Python's, nothing that decides nothing."""
    source = tmp_path / "in.csv"
    source.write_bytes("body;kind\ncafé;yes\n".encode("cp1252"))
    reading = ReadOptions(encoding="cp1252", delimiter=";", quote="")
    options = replace(OPTIONS, truncate="head", other_below=0.5, other="none", words={"yes": ["yes", "sure"]})
    spec = JobSpec(RowSource(source, "body", "kind", ("kind",), 5, options=reading), tmp_path / "o.jsonl", options)
    words = settings_in_words(spec.settings("m", 9))
    assert words == {
        "model": "m",
        "input": f"{source}, in cp1252, fields divided by ';', without quotes",
        "text": "body",
        "true label": "kind",
        "kept fields": "kind",
        "rows": "the first 5",
        "labels": "yes, no",
        "words of labels": "yes: yes, sure",
        "no label is sure": "below 0.5: none",
        "prompt": "Q: {text} A:",
        "texts that are too long": "their head is cut",
        "output": words["output"],
    }
    plain = settings_in_words(JobSpec(RowSource(source), tmp_path / "o.csv", OPTIONS).settings("m", 9))
    assert plain["input"] == str(source)
    for name in ("words of labels", "no label is sure", "texts that are too long", "rows", "true label"):
        assert name not in plain


@given(
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from(["a", "b", None]), st.booleans()), max_size=90),
    st.lists(st.integers(1, 40), max_size=4),
)
def test_notable_rows_are_the_first_twenty_of_each_kind(rows: list[Any], cuts: list[int]) -> None:
    """However the rows are divided into parts, and whatever order the parts are added in."""
    whole, parts, part = Notable(), [], Notable()
    for number, (percent, label, wrong) in enumerate(rows):
        answer = Classification(label, {label: percent / 100}) if label else Classification(None, error=f"e{number}")
        for book in (whole, part):
            book.add(number, f"text {number}", "gold", answer, wrong=wrong)
        if number in cuts:
            parts.append(part)
            part = Notable()
    merged = Notable()
    for other in reversed([*parts, part]):
        merged.merge(Notable.from_json(json.loads(json.dumps(other.as_json()))))
    assert merged == whole
    labelled = [(percent, number, wrong) for number, (percent, label, wrong) in enumerate(rows) if label]
    failed = [number for number, (_, label, _) in enumerate(rows) if not label]
    assert [entry.row for entry in whole.errors] == failed[:20]
    assert [entry.row for entry in whole.uncertain] == [n for _, n, _ in sorted(labelled)][:20]
    surest = sorted((-percent, number) for percent, number, wrong in labelled if wrong)
    assert [entry.row for entry in whole.wrong] == [number for _, number in surest][:20]


def test_the_report_lists_the_rows_worth_a_look(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    source = RowSource(write(table(60), tmp_path / "in.jsonl"), gold_field="gold")
    result = do(JobSpec(source, tmp_path / "out.jsonl", OPTIONS, report=page))
    text = page.read_text()
    headings = ["first rows with errors", "least certain", "most confidently wrong"]
    places = [text.lower().index(heading) for heading in headings]
    assert sorted(places) == places
    found = result.summary.notable
    for rows, begin, end in zip(
        (found.errors, found.uncertain, found.wrong), places, [*places[1:], len(text)], strict=True
    ):
        for entry in rows:
            assert re.search(rf">\s*{entry.row}\s*<", text[begin:end])


def test_what_a_job_will_cost(tmp_path: Path) -> None:
    """Passes and tokens by the rows themselves: here a token costs one."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": "x" * (10 + i % 2 * 10)}) + "\n" for i in range(40)))
    told: list[Estimate] = []
    for labels, passes in ((["a", "b"], 2), (["aa", "ab", "ba", "bb"], 3), (["q"], 1)):
        options = TaskOptions(labels, "{text}:" if len(labels) > 1 else "{text} {label}?", multi_label=len(labels) == 1)
        do(JobSpec(RowSource(source), tmp_path / "o.jsonl", options, overwrite=True), on_begin=told.append)
        estimate = told[-1]
        assert (estimate.rows, estimate.prompts) == (40, 1)
        assert estimate.passes >= passes or len(labels) == 1
        assert f"{estimate.rows:,} rows, prompts of about" in estimate.in_words()
    # 16 bytes on average, of which all share two pages of 4; behind them a space, or twice a space and a letter.
    assert [estimate.tokens for estimate in told[:2]] == [16, 16]
    assert [estimate.cost for estimate in told[:2]] == [16 - 8 + 1, 16 - 8 + 2 + 2]


def test_peak_of_this_host_is_measured() -> None:
    peak = measure_peak()
    assert peak is not None
    assert 1e8 < peak < 1e17
