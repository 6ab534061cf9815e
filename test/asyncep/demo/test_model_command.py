"""`asyncep demo-model --out` where it ends before anything is built: nothing of the user's is replaced."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from asyncep.cli import main
from asyncep.demo.build import REPORT_NAME, DemoReport

# Of another recipe: such a model is replaced.
OLD = DemoReport("before", "sparse", 8, 2, 1, 1, 1.0, 0, 1.0, [], [])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("files", "out", "words"),
    [
        (["mine.txt"], "model", "holds mine.txt"),
        ([REPORT_NAME, "config.json", "mine.txt"], "model", "holds mine.txt, which no build has made"),
        ([REPORT_NAME, "config.json/mine", "notes/mine"], "model", "holds notes"),
        ([], "gone/model", "there is no folder .*gone"),
        (["../.model.lock"], "model", r"\.model\.lock is there"),
    ],
)
def test_nothing_of_the_users_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[str], out: str, words: str
) -> None:
    for name in files:
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model").mkdir(exist_ok=True)
        path.write_text(json.dumps(vars(OLD)) if name == REPORT_NAME else "mine")
    before = tree(tmp_path)
    assert main(["demo-model", "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("asyncep demo-model: --out: ")
    assert re.search(words, error)
    assert tree(tmp_path) == before
    assert not (tmp_path / "gone").exists()
