"""`asyncep classify` from end to end on the toy model behind HTTP: pipes, exit statuses, signals, what is printed."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from asyncep_sgl.process.ports import free_port

TOY = Path(__file__).parents[2] / "support" / "toy_http.py"


def toy(seconds: float) -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen([sys.executable, str(TOY), str(port), str(seconds)])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{url}/model_info", trust_env=False)
                break
            except httpx.HTTPError:
                assert process.poll() is None
                time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    yield from toy(0.0)


@pytest.fixture
def slow_url() -> Iterator[str]:
    yield from toy(0.3)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "asyncep", "classify", *arguments]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*arguments), capture_output=True, timeout=120, **options)


def lines(rows: int) -> bytes:
    return b"".join(json.dumps({"id": i, "text": f"text {i}"}).encode() + b"\n" for i in range(rows))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_from_pipe_to_pipe(url: str, tmp_path: Path) -> None:
    done = run("-", "-", "--labels", "a,b", "--keep", "id", "--url", url, input=lines(50), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["id"] for record in found] == list(range(50))
    assert all(record["label"] in ("a", "b") for record in found)
    told = done.stderr.decode()
    assert "50 rows, prompts of about" in told
    assert "classifying: 50 of 50 rows" in told
    assert "50 rows, 0 with errors, written to standard output" in told
    assert left(tmp_path) == []


def test_a_pipe_of_csv_to_a_compressed_file(url: str, tmp_path: Path) -> None:
    table = b"body;label\nBuy;1.0\nSell;2.0\n\n"
    output = tmp_path / "out.jsonl.gz"
    arguments = ["--text-field", "body", "--gold-field", "label", "--labels", "1,2", "--input-format", "csv"]
    done = run("-", str(output), *arguments, "--url", url, input=table)
    assert done.returncode == 0, done.stderr
    with gzip.open(output) as rows:
        assert [json.loads(row)["gold"] for row in rows] == ["1", "2"]
    assert left(tmp_path) == ["out.jsonl.gz", "out.jsonl.gz.html"]


def test_a_broken_pipe_of_rows_is_refused_before_anything_is_computed(url: str, tmp_path: Path) -> None:
    done = run("-", str(tmp_path / "out.jsonl"), "--labels", "a,b", "--url", url, input=b'{"body": "x"}\n')
    assert done.returncode == 2
    assert b"no line has a field 'text'; the first has body" in done.stderr
    assert left(tmp_path) == []


def test_a_file_as_standard_input_is_not_written_over(url: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines(3))
    for more in ([str(source)], [str(tmp_path / "out.jsonl"), "--report", str(source)]):
        with source.open("rb") as rows:
            done = run("-", *more, "--labels", "a,b", "--url", url, "--overwrite", stdin=rows)
        assert done.returncode == 2
        assert b"is the file that is read as IN" in done.stderr
    assert source.read_bytes() == lines(3)
    assert left(tmp_path) == ["in.jsonl"]


def test_whoever_reads_the_rows_may_have_enough(url: str) -> None:
    process = subprocess.Popen(
        command("-", "-", "--labels", "a,b", "--url", url), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.close()
    process.stdin.write(lines(2000))
    process.stdin.close()
    assert process.wait(120) == 1


@pytest.mark.parametrize(
    ("most", "status"), [("100%", 0), ("1", 1), ("2", 0), ("19%", 1), ("20%", 0), ("0", 1), ("0%", 1)]
)
def test_the_share_of_errors_decides_the_exit_status(url: str, tmp_path: Path, most: str, status: int) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines(8) + b'{"text": ""}\nnot json\n')
    done = run(str(source), str(tmp_path / "o.csv"), "--labels", "a,b", "--url", url, "--max-errors", most)
    assert done.returncode == status, done.stderr
    assert (b"2 of 10 rows have errors, more than --max-errors" in done.stderr) == bool(status)
    assert (tmp_path / "o.csv").exists()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_job_goes_on(slow_url: str, tmp_path: Path, stop: signal.Signals) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines(4000))
    arguments = [str(source), str(output), "--labels", "a,b", "--url", slow_url, "--part-rows", "500"]
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE)
    part = tmp_path / "out.jsonl.job" / "part-000000"
    while not part.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(stop)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + stop, told
    assert b"stopped; what is done is kept, the same command goes on" in told
    assert not output.exists()
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["row"] for line in output.read_bytes().splitlines()] == list(range(4000))
    assert left(tmp_path) == ["in.jsonl", "out.jsonl", "out.jsonl.html"]


def test_a_stopped_job_of_pipes_leaves_nothing(slow_url: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        command("-", "-", "--labels", "a,b", "--url", slow_url),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert process.stdin is not None
    process.stdin.write(lines(3000))
    process.stdin.close()
    while not list(scratch.glob("*/output.job")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.stderr is not None
    told = process.stderr.read()
    assert process.wait(60) == 143
    assert b"nothing is kept of a job that writes to standard output" in told
    assert left(scratch) == []


def test_labels_files_and_several_labels(url: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        '{"text": "x", "kind": ["a"]}\n{"text": "y", "kind": "a; b"}\n{"text": "z", "kind": "c"}\n'
    )
    (tmp_path / "labels.yaml").write_text(
        "- {label: a, description: the first, threshold: 0}\n- {label: b, threshold: 1}\n"
    )
    arguments = ["--labels-file", str(tmp_path / "labels.yaml"), "--multi-label", "--gold-field", "kind"]
    done = run(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), *arguments, "--url", url)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert [record["labels"] for record in found] == [["a"]] * 3
    told = done.stdout.decode()
    assert "all labels of a row right 0.333" in told
    assert "1 true labels are none of the labels, and count as wrong: 'c' (1)" in told
    assert "2 prompts a row (one a label)" in done.stderr.decode()
    page = (tmp_path / "out.jsonl.html").read_text()
    for words in ("Precision and recall", "The least certain rows", "The most confidently wrong rows", "a: the first"):
        assert words in page


def test_the_model_is_looked_at_before_anything_is_started(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(lines(1))
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for model, words in ((str(dense), b"is a dense model"), ("./nowhere", b"no such folder")):
        done = run("in.jsonl", "out.jsonl", "--labels", "a,b", "--model-path", model, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert b"starting" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labels", "a,b", "--labels-file", "l.txt"], "give either --labels A,B,… or --labels-file FILE"),
        ([], "give either --labels"),
        (["--labels", "a,b", "--other", "c"], "--other: only with --other-below"),
        (["--labels", "a,b", "--report", "r.html", "--no-report"], "give either --report FILE or --no-report"),
        (["--labels", "a,b", "--dp-size", "2"], "--dp-size: only with --model-path"),
        (["--labels", "a,b", "--peak-tflops", "-1"], "--peak-tflops -1.0: a number above 0"),
        (["--labels", "a,b", "--threshold", "0.5"], "--threshold: only with --multi-label"),
        (["--labels", "a,b", "--other-below", "2"], "--other-below: a number from 0 to 1"),
        (["--labels", "a,b", "--max-errors", "many"], "--max-errors 'many': a number of rows, or a share"),
        (["--labels", "a,b", "--max-errors", "101%"], "--max-errors '101%'"),
        (["--labels", "a,b", "--delimiter", ";"], "--delimiter: only for CSV and TSV"),
        (["--labels", "a,b", "--input-format", "xml"], "--input-format 'xml': give one of jsonl, json"),
        (["--labels", "a,b", "--output-format", "doc"], "--output-format 'doc'"),
        (["--labels", 'a,"b'], "--labels: "),
        (["--labels", "a,a"], "--labels: at least two different"),
        (["--labels", "a,b", "--system", "x"], "--system: only a chat has a system message; give --chat too"),
    ],
)
def test_flags_that_cannot_be_used(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(lines(1))
    done = run("in.jsonl", "out.jsonl", *arguments, "--url", "http://127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr.decode()
    assert len(done.stderr.decode().strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("out.xlsx", "out.xlsx: give a .jsonl, .json, .csv"),
        ("gone/out.jsonl", "OUT gone/out.jsonl: there is no folder gone; make it"),
        ("in.jsonl/out.jsonl", "in.jsonl"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_a_server_is_started(
    tmp_path: Path, output: str, words: str
) -> None:
    (tmp_path / "in.jsonl").write_bytes(lines(1))
    done = run("in.jsonl", output, "--labels", "a,b", "--model-path", "some/model", cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr.decode()
    assert b"starting" not in done.stderr
    assert left(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--chat"], "--chat: the model cannot be used with a chat template"),
        (["--calibrate", "x" * 50_000], "--calibrate: a neutral text cannot be scored"),
    ],
)
def test_what_only_the_server_knows_is_said_of_the_flag(url: str, tmp_path: Path, flags: list[str], words: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(lines(1))
    done = run("in.jsonl", "out.jsonl", "--labels", "a,b", "--url", url, *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr.decode()


def test_rows_of_another_kind_in_a_pipe_are_refused(url: str) -> None:
    done = run("-", "-", "--labels", "a,b", "--url", url, input=b"text,id\nhello,1\n")
    assert done.returncode == 2
    assert b"not one line is a JSON object (line 1: not JSON" in done.stderr
    assert b"Give --input-format" in done.stderr


def test_true_labels_that_are_none_of_the_labels_are_said(url: str, tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "gold": gold} for i, gold in enumerate(["a", "b", "c", "c", "d"])]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("in.jsonl", "out.jsonl", "--labels", "a,b", "--gold-field", "gold", "--url", url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 true labels are none of the labels, and count as wrong: 'c' (2), 'd' (1)" in done.stdout.decode()
    assert json.loads(done.stdout.splitlines()[-1])["gold_outside_labels"] == 3


def test_a_start_that_is_stopped_leaves_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(lines(3))
    words = command("in.jsonl", "out.jsonl", "--labels", "a,b", "--model-path", str(tiny_model("qwen3_moe")))
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        assert b"starting 1 rank(s)" in process.stderr.readline()
        while not (servers := psutil.Process(process.pid).children(recursive=True)):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
        assert b"stopped; what is done is kept" in process.stderr.read()
    _, alive = psutil.wait_procs(servers, timeout=30)
    assert not alive
    assert left(tmp_path) == ["in.jsonl"]
