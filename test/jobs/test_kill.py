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


def test_killed_at_every_durable_operation(rows: Path, expected: bytes, tmp_path: Path) -> None:
    for operation in range(1, 200):
        output = tmp_path / f"{operation}.jsonl"
        first = run(rows, output, str(operation))
        if first.returncode == 0:
            # It has fewer: every one of them was tried.
            assert operation > 20
            break
        assert first.returncode == -signal.SIGKILL
        # Until the output is there it is not there at all.
        assert not output.exists() or output.read_bytes() == expected
        second = run(rows, output)
        assert second.returncode == 0, second.stderr
        assert output.read_bytes() == expected
    else:
        pytest.fail("the job never got through")


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
