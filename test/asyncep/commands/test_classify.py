"""`asyncep classify` where it ends before a server has anything to do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from asyncep.cli import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["in.jsonl", "o.jsonl", "--labels", "a", "--url", "http://x"],
            "--labels: at least two different ones are needed",
        ),
        (["in.jsonl", "o.jsonl", "--labels", "a,b"], "either --url .* or --model-path"),
        (["no.jsonl", "o.jsonl", "--labels", "a,b", "--url", "http://x"], "no.jsonl: no such file"),
        (
            ["in.jsonl", "o.jsonl", "--labels", "a,b", "--url", "http://x", "--template", "none"],
            "--template: .text. is needed exactly once",
        ),
        (["in.jsonl", "o.jsonl", "--labels", "a,b", "--url", "http://x", "--limit", "-1"], "--limit -1"),
        (["in.jsonl", "o.jsonl", "--labels", "a,b", "--url", "http://x", "--system", "s"], "system: .*chat"),
    ],
)
def test_wrong_command_lines(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"text": "x"}\n')
    assert main(["classify", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.search(words, error)


def test_no_server_there(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    command = [sys.executable, "-m", "asyncep", "classify", str(tmp_path / "in.jsonl"), str(tmp_path / "o.jsonl")]
    done = subprocess.run(
        [*command, "--labels", "a,b", "--url", "http://127.0.0.1:9"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("asyncep classify: http://127.0.0.1:9")
    # Nothing of a job that never began is left.
    assert not (tmp_path / "o.jsonl.job").exists()


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b"])
def test_wrong_shards(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["classify", "in.jsonl", "o.jsonl", "--labels", "a,b", "--url", "http://x", "--shard", shard])
    assert "from 1/n to n/n" in capsys.readouterr().err
