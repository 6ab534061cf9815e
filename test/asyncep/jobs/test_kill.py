"""A job killed with kill -9 at every durable operation, and between them, ends with the same file."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).parent / "toy_job.py"
ROWS = 430


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "in.jsonl"
    lines = [
        json.dumps({"text": f"text {i % 390}", "gold": "yes" if i % 3 else "no", "id": f"#{i}"}) for i in range(ROWS)
    ]
    lines[17] = "broken"
    path.write_text("\n".join(lines))
    return path


def run(rows: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOB), str(rows), str(output), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def expected(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run without a kill writes."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    done = run(rows, output)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["row"] for record in records] == list(range(ROWS))
    assert [record["row"] for record in records if "error" in record] == [17]
    assert not output.with_name("out.jsonl.job").exists()
    return output.read_bytes()


def kill_and_go_on(rows: Path, expected: bytes, output: Path, operation: int, *arguments: str) -> bool:
    """A job killed at an operation and run again; False if it has fewer operations."""
    first = run(rows, output, str(operation), *arguments)
    if first.returncode == 0:
        return False
    assert first.returncode == -signal.SIGKILL
    # Until the output is there it is not there at all.
    assert not output.exists() or output.read_bytes() == expected
    finished = output.exists() and not output.with_name(output.name + ".job").joinpath("state.sqlite").exists()
    second = run(rows, output, "0", *arguments)
    if finished:
        # Only the empty record was left to take away: the output is as good as anybody's, and is not touched.
        assert f"OUT {output}: is there already" in second.stderr
    else:
        assert second.returncode == 0, second.stderr
        reports = [output.with_name(output.name + ".html")] if arguments else []
        assert sorted(output.parent.glob(f"*{output.name}*")) == [output, *reports]
    assert output.read_bytes() == expected
    return True


def test_killed_at_every_durable_operation(rows: Path, expected: bytes, tmp_path: Path) -> None:
    operation = 1
    while kill_and_go_on(rows, expected, tmp_path / f"o{operation}.jsonl", operation):
        operation += 1
    # Every one of them was tried.
    assert operation > 20


def test_killed_between_the_output_its_report_and_the_end(rows: Path, expected: bytes, tmp_path: Path) -> None:
    whole = run(rows, tmp_path / "whole.jsonl", "0", "report")
    operations = int(whole.stdout.split()[-2])
    # Five parts, the record's three files, the lock and the folder are taken away at the end.
    for operation in range(operations - 18, operations - 8):
        assert kill_and_go_on(rows, expected, tmp_path / f"o{operation}.jsonl", operation, "report")


def test_killed_again_and_again(rows: Path, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    chance = random.Random(5)
    kills = 0
    while True:
        command = [sys.executable, str(JOB), str(rows), str(output)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = []
            wanted = chance.randrange(2, 7)
            for line in process.stdout:
                lines.append(line)
                if len(lines) == wanted and not line.startswith("done") and kills < 10:
                    process.kill()
                    kills += 1
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert kills >= 3
    assert output.read_bytes() == expected


def test_what_was_kept_is_not_computed_again(rows: Path, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    whole = run(rows, tmp_path / "whole.jsonl")
    assert run(rows, output, "20").returncode == -signal.SIGKILL
    rest = run(rows, output)
    asked = [int(done.stdout.split()[-1]) for done in (whole, rest)]
    assert asked[1] < 0.9 * asked[0]
    assert output.read_bytes() == expected
