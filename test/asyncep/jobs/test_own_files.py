"""Nothing of the user's is written over: every path a job reads against every path it writes, by every kind of link."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_model import ByteTokens, ToyServer, toy_facts

from asyncep.cli import main
from asyncep.files.rows import RowSource
from asyncep.jobs import run as run_module
from asyncep.jobs.journal import JobError, open_journal
from asyncep.jobs.run import run_job
from asyncep.jobs.spec import JobResult, JobSpec
from asyncep.own_files import OutputError, check_free, new_file, put_in_place, same_file
from asyncep.tasks.session import session_with
from asyncep.tasks.task import TaskOptions

OPTIONS = TaskOptions(["yes", "no"], "Q: {text} A:")
ROWS = '{"text": "one", "label": "yes"}\n{"text": "two", "label": "no"}\n'


def do(spec: JobSpec, **told: Any) -> JobResult:
    async def run() -> JobResult:
        async with session_with(ToyServer(), ByteTokens(), toy_facts()) as session:
            return await run_job(spec, session, **told)

    return asyncio.run(run())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# How a path may lead to a file that stands elsewhere.
LINKS: dict[str, Callable[[Path, Path], Path]] = {
    "itself": lambda target, _: target,
    "another spelling": lambda target, folder: folder / "elsewhere" / ".." / os.path.relpath(target, folder),
    "symbolic link": lambda target, folder: _made(folder / "link.jsonl", lambda path: path.symlink_to(target)),
    "link to a link": lambda target, folder: _made(
        folder / "second.jsonl",
        lambda path: path.symlink_to(_made(folder / "first.jsonl", lambda first: first.symlink_to(target))),
    ),
    "hard link": lambda target, folder: _made(folder / "hard.jsonl", lambda path: os.link(target, path)),
    "folder that is a link": lambda target, folder: (
        _made(folder / "way", lambda path: path.symlink_to(target.parent)) / target.name
    ),
}


def _made(path: Path, make: Callable[[Path], object]) -> Path:
    make(path)
    return path


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("reads", ["IN", "--calibration", "--examples", "--template", "--labels-file"])
@pytest.mark.parametrize("writes", ["OUT", "--report"])
def test_what_is_read_is_never_written_over(tmp_path: Path, link: str, reads: str, writes: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    texts = {"template": "Q: {text} A:", "labels": "yes\nno\n"}
    for name in ("in", "neutral", "shots", "template", "labels"):
        (tmp_path / f"{name}.jsonl").write_text(texts.get(name, ROWS))
    names = {"IN": "in", "--calibration": "neutral", "--examples": "shots", "--template": "template"}
    names["--labels-file"] = "labels"
    path = LINKS[link](tmp_path / f"{names[reads]}.jsonl", tmp_path)
    before = contents(tmp_path)
    output, report = (path, "r.html") if writes == "OUT" else (tmp_path / "out.jsonl", str(path))
    command = ["classify", str(tmp_path / "in.jsonl"), str(output), "--url", "http://127.0.0.1:9"]
    command += [
        "--labels-file",
        str(tmp_path / "labels.jsonl"),
        "--calibration",
        str(tmp_path / "neutral.jsonl"),
        "--examples",
        str(tmp_path / "shots.jsonl"),
    ]
    command += ["--template", f"@{tmp_path / 'template.jsonl'}", "--report", str(tmp_path / report), "--overwrite"]
    assert main(command) == 2
    assert contents(tmp_path) == before


def test_the_command_names_both_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\none\n")
    assert main(["classify", str(path), str(path), "--labels", "a,b", "--url", "http://127.0.0.1:9"]) == 2
    assert f"OUT {path}: is the file that is read as IN; give another path" in capsys.readouterr().err
    model = tmp_path / "model"
    model.mkdir()
    (model / "notes.csv").write_text("mine")
    command = ["classify", str(path), str(model / "notes.csv"), "--labels", "a,b", "--model-path", str(model)]
    assert main([*command, "--overwrite"]) == 2
    assert "is a file of --model-path, which is read" in capsys.readouterr().err


@pytest.mark.parametrize("report", ["out.jsonl", "out.jsonl.job", "out.jsonl.job/state.sqlite", "out.jsonl.job/page"])
def test_report_and_output_do_not_meet(tmp_path: Path, report: str) -> None:
    (tmp_path / "in.jsonl").write_text(ROWS)
    spec = JobSpec(RowSource(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", OPTIONS, report=tmp_path / report)
    with pytest.raises(OutputError, match="--report"):
        do(replace(spec, overwrite=True))
    assert list(contents(tmp_path)) == ["in.jsonl"]


def test_an_input_in_the_jobs_own_folder_is_not_emptied_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "out.jsonl.job"
    folder.mkdir()
    (folder / "part-000000").write_text(ROWS)
    (tmp_path / "in.jsonl").symlink_to(folder / "part-000000")
    for source in (folder / "part-000000", tmp_path / "in.jsonl"):
        path = source if source.suffix else source.rename(folder / "part.jsonl")
        with pytest.raises((OutputError, ValueError)):
            do(JobSpec(RowSource(path), tmp_path / "out.jsonl", OPTIONS))
    assert (folder / "part.jsonl").read_text() == ROWS


@pytest.mark.parametrize("writes", ["OUT", "--report"])
@pytest.mark.parametrize("kind", ["file", "link to a file", "link to nothing", "folder", "link to a folder", "pipe"])
def test_what_is_there_already_stays(tmp_path: Path, writes: str, kind: str) -> None:
    (tmp_path / "in.jsonl").write_text(ROWS)
    (tmp_path / "kept").write_text("mine")
    (tmp_path / "folder").mkdir()
    path = tmp_path / ("out.jsonl" if writes == "OUT" else "page.html")
    make: dict[str, Callable[[], object]] = {
        "file": lambda: path.write_text("mine"),
        "link to a file": lambda: path.symlink_to("kept"),
        "link to nothing": lambda: path.symlink_to("nothing"),
        "folder": path.mkdir,
        "link to a folder": lambda: path.symlink_to("folder"),
        "pipe": lambda: os.mkfifo(path),
    }
    make[kind]()
    before = contents(tmp_path)
    spec = JobSpec(RowSource(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", OPTIONS, report=tmp_path / "page.html")
    with pytest.raises(
        OutputError, match=f"{writes} .*({'--overwrite' if 'nothing' in kind or 'file' in kind else ''})"
    ):
        do(spec)
    assert contents(tmp_path) == before
    assert not (tmp_path / "out.jsonl.job").exists()
    if kind in ("folder", "link to a folder", "pipe"):
        with pytest.raises(OutputError, match="is there and not a file"):
            do(replace(spec, overwrite=True))
    else:
        assert do(replace(spec, overwrite=True)).summary.rows == 2
        assert not path.is_symlink()
        # What a link led to is not what was asked to be written over.
        assert (tmp_path / "kept").read_text() == "mine"
        assert not (tmp_path / "nothing").exists()


def test_what_comes_to_stand_there_meanwhile_stays_and_the_work_too(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(ROWS)
    spec = JobSpec(RowSource(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", OPTIONS)
    with pytest.raises(OutputError, match=r"OUT .* is there already"):
        do(spec, on_progress=lambda _: (tmp_path / "out.jsonl").write_text("mine"))
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    (tmp_path / "out.jsonl").unlink()
    server = do(spec)
    assert server.total("prompts") == 2
    assert len(server.runs) == 2
    assert server.runs[1]["prompts"] == 0


def test_a_job_that_is_done_is_not_done_again_over_its_output(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(ROWS)
    spec = JobSpec(RowSource(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", OPTIONS)
    do(spec)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"is there already; move it away, give another path, or give --overwrite"):
        do(spec)
    assert contents(tmp_path) == before
    assert do(replace(spec, overwrite=True)).summary.rows == 2


@pytest.mark.parametrize("name", ["notes.txt", "part-1x", "lock/inside"])
def test_a_folder_that_is_not_a_jobs_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "in.jsonl").write_text(ROWS)
    mine = tmp_path / "out.jsonl.job" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for restart in (False, True):
        with pytest.raises(JobError, match=r"out\.jsonl\.job"):
            do(JobSpec(RowSource(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", OPTIONS, restart=restart))
        assert mine.read_text() == "mine"


def test_files_of_names_that_jobs_used_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(ROWS)
    for name in ("out.jsonl.tmp", "page.html.tmp", ".out.jsonl.tmp"):
        (tmp_path / name).write_text("mine")
    do(JobSpec(RowSource(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", OPTIONS, report=tmp_path / "page.html"))
    assert sorted(path for path, content in contents(tmp_path).items() if content == b"mine") == [
        ".out.jsonl.tmp", "out.jsonl.tmp", "page.html.tmp",
    ]  # fmt: skip
    assert len(contents(tmp_path)) == 6


def test_an_input_that_changes_on_the_way_is_said(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(ROWS)
    spec = JobSpec(RowSource(path), tmp_path / "out.jsonl", OPTIONS)
    with pytest.raises(JobError, match="has changed while the job ran"):
        do(spec, on_progress=lambda _: path.write_text(ROWS * 2))
    assert not spec.output.exists()


def test_rows_that_are_missing_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl").write_text(ROWS)
    part = run_module._Job._part

    def lossy(self: Any, rows: list[Any], scores: Any) -> Any:
        return part(self, rows[1:], scores)

    monkeypatch.setattr(run_module._Job, "_part", lossy)
    with pytest.raises(JobError, match="has 2 rows, and 1 were written"):
        do(JobSpec(RowSource(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", OPTIONS))


def test_one_of_two_at_once_gets_the_name(tmp_path: Path) -> None:
    """As a race may have it: both have looked and found nothing there."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        check_free("OUT", tmp_path / "out", overwrite=False)
    put_in_place("OUT", tmp_path / "a", tmp_path / "out", overwrite=False)
    with pytest.raises(OutputError):
        put_in_place("OUT", tmp_path / "b", tmp_path / "out", overwrite=False)
    assert contents(tmp_path) == {"out": b"a", "b": b"b"}


def test_a_second_process_on_the_same_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(ROWS)
    program = (
        "import sys; from pathlib import Path; from asyncep.jobs.journal import open_journal\n"
        "with open_journal(Path(sys.argv[1]), {}): print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out.jsonl")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(JobError, match="another process works on this job"):
            do(JobSpec(RowSource(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", OPTIONS, restart=True, overwrite=True))
        other.kill()
    with open_journal(tmp_path / "out.jsonl", {}) as journal:
        journal.finished = True
    assert not (tmp_path / "out.jsonl.job").exists()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=50), fails=st.booleans(), overwrite=st.booleans(), there=st.none() | st.binary())
def test_new_files_are_whole_or_not_there(
    tmp_path: Path, content: bytes, fails: bool, overwrite: bool, there: bytes | None
) -> None:
    path = tmp_path / "file"
    path.unlink(missing_ok=True)
    if there is not None:
        path.write_bytes(there)
    expected = there
    try:
        with new_file("OUT", path, overwrite=overwrite) as file:
            file.write(content)
            if fails:
                raise ZeroDivisionError
        expected = content
    except ZeroDivisionError:
        pass
    except OutputError:
        assert there is not None
        assert not overwrite
    assert (path.read_bytes() if path.exists() else None) == expected
    assert len(list(tmp_path.iterdir())) == (expected is not None)


def test_demo_data_writes_over_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "news.jsonl"
    output.write_text("mine")
    assert main(["demo-data", "bbc", str(output)]) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main(["demo-data", "bbc", str(output), "--overwrite", "--characters", "5"]) == 0
    assert len(output.read_text().splitlines()) == 2225
    assert main(["demo-data", "bbc", str(tmp_path / "gone" / "news.jsonl")]) == 2
    assert not (tmp_path / "gone").exists()


def test_data_that_is_missing_costs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCEP_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "mails.jsonl"
    output.write_text("mine")
    assert main(["demo-data", "spam-assassin", str(output), "--overwrite"]) == 2
    assert contents(tmp_path) == {"mails.jsonl": b"mine"}


def test_same_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "b").write_text("")
    assert same_file(tmp_path / "a", tmp_path / "x" / ".." / "a")
    assert not same_file(tmp_path / "a", tmp_path / "b")
    assert same_file(tmp_path / "new", tmp_path / "." / "new")
