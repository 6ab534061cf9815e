"""The build: once, whole or not at all, and never over somebody else's directory."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import pytest

from asyncep.demo import build
from asyncep.demo.build import REPORT_NAME, build_demo_model, default_model_path, recipe_hash

if TYPE_CHECKING:
    from pathlib import Path


class FakeBuilder:
    """Stands in for the conversion: writes a report, counts its calls, and fails when told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.fail = False
        self.started = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, directory: Path, variant: str, _progress: object) -> None:
        self.calls += 1
        self.started.set()
        (directory / "model.safetensors").write_text("half")
        assert self.go_on.wait(10)
        if self.fail:
            raise OSError("disk full")
        fields = dict.fromkeys(build.DemoReport.__annotations__, 0)
        report = fields | {"recipe": recipe_hash(), "variant": variant}
        (directory / REPORT_NAME).write_text(json.dumps(report))


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> FakeBuilder:
    fake = FakeBuilder()
    monkeypatch.setattr(build, "_build", fake)
    return fake


def test_a_second_build_does_nothing(tmp_path: Path, builder: FakeBuilder) -> None:
    assert build_demo_model(tmp_path / "m") == build_demo_model(tmp_path / "m") == tmp_path / "m"
    assert builder.calls == 1


def test_another_variant_or_recipe_is_built_anew(
    tmp_path: Path, builder: FakeBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = build_demo_model(tmp_path / "m")
    build_demo_model(out, variant="exact")
    assert json.loads((out / REPORT_NAME).read_text())["variant"] == "exact"
    monkeypatch.setattr(build, "_is_current", lambda *_: False)
    build_demo_model(out, variant="exact")
    assert builder.calls == 3


def test_a_failed_build_leaves_nothing(tmp_path: Path, builder: FakeBuilder) -> None:
    builder.fail = True
    with pytest.raises(OSError, match="disk full"):
        build_demo_model(tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == [".m.lock"]


def test_what_a_killed_build_left_is_removed(tmp_path: Path, builder: FakeBuilder) -> None:
    (tmp_path / ".m.building-dead").mkdir()
    build_demo_model(tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.lock", "m"]
    assert builder.calls == 1


def test_foreign_directories_are_not_overwritten(tmp_path: Path, builder: FakeBuilder) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a demo model"):
        build_demo_model(tmp_path)
    assert builder.calls == 0


def test_two_builders_at_once_build_once(tmp_path: Path, builder: FakeBuilder) -> None:
    builder.go_on.clear()
    workers = [threading.Thread(target=build_demo_model, args=(tmp_path / "m",)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert builder.started.wait(10)
    assert not (tmp_path / "m").exists()  # nothing to see before it is whole
    builder.go_on.set()
    for worker in workers:
        worker.join(10)
    assert builder.calls == 1


def test_the_cache_lies_outside_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ASYNCEP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_model_path() == tmp_path / "asyncep" / f"demo-model-{recipe_hash()}" / "sparse"
    monkeypatch.setenv("ASYNCEP_CACHE", str(tmp_path / "elsewhere"))
    assert default_model_path("exact").is_relative_to(tmp_path / "elsewhere")
