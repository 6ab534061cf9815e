"""Every flag of ours in every mode: it reaches what reads it, or it is refused by name."""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

import asyncep_sgl
from asyncep_sgl.config.flags import MODES, Declared, Mode, add_flags, declared, read_flags, setting
from asyncep_sgl.config.front import FrontSettings
from asyncep_sgl.config.run import CONFIG_VARIABLE, AsyncEPConfig
from asyncep_sgl.config.settings import GATHERING, BatchSettings, GroupSettings, RouterSettings, RunSettings
from asyncep_sgl.errors import UsageError
from asyncep_sgl.launcher import launch
from asyncep_sgl.launcher.command_line import parse
from asyncep_sgl.launcher.cuda_attention import CudaHost
from asyncep_sgl.launcher.cuda_host import Gpu
from asyncep_sgl.process.ports import free_port

GROUPS = (RunSettings, RouterSettings, GroupSettings, BatchSettings, FrontSettings)
FLAGS = [(group, field.name, flag) for group in GROUPS for field, flag in declared(group)]
NAMES = [flag.name for _, _, flag in FLAGS]
H100 = Gpu("NVIDIA H100", (9, 0), 80 << 30)

# What makes a command line one of its mode.
MODE_FLAGS: dict[Mode, list[str]] = {
    "memory": ["--device", "cpu", "--dp-size", "2"],
    "hosts": ["--device", "cpu", "--nnodes", "2", "--dist-init-addr", "host:1", "--dp-size", "2"],
    "disk": ["--device", "cpu", "--asyncep-expert-memory", "1"],
    "gpu": ["--device", "cuda", "--asyncep-transport", "cuda"],
    "cuda": ["--device", "cuda", "--dp-size", "2", "--asyncep-transport", "cuda"],
    "pinned": ["--device", "cuda", "--asyncep-transport", "pinned"],
}
# Flags that make a mode or that other tests are about.
ELSEWHERE = {"--asyncep-strategy", "--nnodes", "--node-rank", "--dist-init-addr"}
# Values other than the default, where neither a 3 nor another choice is one.
VALUES = {
    "--asyncep-expert-memory": "1",
    "--asyncep-batch-dir": "batches",
    "--asyncep-without": "direct-replies",
    "--asyncep-copies": "2",
    "--asyncep-cors-origins": "https://a",
}


def value_of(flag: Declared, default: Any) -> list[str]:
    if default is False:
        return []
    if flag.name in VALUES:
        return [VALUES[flag.name]]
    return [next((choice for choice in flag.choices if choice != default), "3")]


def default_of(group: type, name: str) -> Any:
    return next(field.default for field in fields(group) if field.name == name)


def changes_the_mode(flag: Declared, mode: Mode) -> bool:
    return flag.name == "--asyncep-expert-memory" and mode == "memory"


class Recorded:
    """In the supervisor's place: what would be started."""

    def __init__(self, store: Any, command: list[str], environment: dict[str, str], *_: Any, **__: Any) -> None:
        self.store, self.command, self.environment = store, command, environment
        self.listeners: Sequence[Any] = ()
        self.signals = None

    def run(self) -> int:
        started.append(self.environment)
        self.store.close()
        for listener in self.listeners:
            listener.close()
        return 0


started: list[dict[str, str]] = []


@pytest.fixture
def run_of(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path], tmp_path: Path
) -> Iterator[Callable[..., AsyncEPConfig]]:
    """Makes the configuration that a command line's processes would get."""
    monkeypatch.setattr(launch, "find_gpus", lambda: [H100] * 2)
    monkeypatch.setattr(launch, "installed", lambda gpu: CudaHost(gpu.capability, flashinfer=True, fa3=False))
    monkeypatch.setattr(launch, "Supervisor", Recorded)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    model = str(tiny_model("qwen3_moe"))

    def run(*arguments: str) -> AsyncEPConfig:
        started.clear()
        assert launch.serve(parse(["--model", model, "--port", str(free_port()), *arguments])) == 0
        monkeypatch.setenv(CONFIG_VARIABLE, started[0][CONFIG_VARIABLE])
        config = AsyncEPConfig.from_environment()
        assert config is not None
        return config

    yield run
    started.clear()


@pytest.mark.parametrize("mode", MODES)
def test_each_flag_reaches_every_process_or_is_refused(
    mode: Mode, run_of: Callable[..., AsyncEPConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_of(*MODE_FLAGS[mode])
    for group, name, flag in FLAGS:
        default = default_of(group, name)
        given = value_of(flag, default)
        if flag.name in ELSEWHERE or changes_the_mode(flag, mode):
            continue
        if flag.name == "--asyncep-transport" and mode in ("gpu", "cuda", "pinned"):
            given = ["pinned" if mode == "pinned" else "cuda"]
        # SGLang's kernels do not see what was gathered: the strategy refuses them.
        blind = flag.name == "--asyncep-kernels" and mode in GATHERING
        if mode not in flag.only or blind:
            with pytest.raises(UsageError, match=f"{flag.name}[: ]"):
                run_of(*MODE_FLAGS[mode], flag.name, *given)
            continue
        config = run_of(*MODE_FLAGS[mode], flag.name, *given)
        there: Any = {
            RunSettings: config.settings,
            RouterSettings: config.router,
            GroupSettings: config.group,
            BatchSettings: config.batches,
            FrontSettings: config.front,
        }[group]
        found = getattr(there, name)
        if flag.name == "--asyncep-gather-depth":
            assert config.group.depth == 3
        if flag.name == "--asyncep-batch-dir":
            assert Path(found) == tmp_path / "batches"
        elif isinstance(found, tuple):
            assert found == (given[0],)
        else:
            assert (found is True) if default is False else str(found).removesuffix(".0") == given[0], flag.name


@pytest.mark.parametrize("mode", MODES)
def test_a_default_that_is_given_is_never_refused(mode: Mode, run_of: Callable[..., AsyncEPConfig]) -> None:
    for group, name, flag in FLAGS:
        default = default_of(group, name)
        if default not in (None, False, (), "") and flag.name not in ("--nnodes", "--asyncep-transport"):
            run_of(*MODE_FLAGS[mode], flag.name, str(default))


def test_a_server_that_has_ended_holds_no_memory(run_of: Callable[..., AsyncEPConfig]) -> None:
    def held() -> int:
        paths = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return sum("memfd:asyncep-" in os.readlink(path) for path in paths if os.path.islink(path))

    before = held()
    run_of(*MODE_FLAGS["memory"])
    assert held() == before


def test_sglangs_flags_of_several_hosts_may_be_given_for_one(run_of: Callable[..., AsyncEPConfig]) -> None:
    """As templates for any number of hosts do."""
    run_of("--device", "cpu", "--nnodes", "1", "--node-rank", "0", "--dist-init-addr", "localhost:20000")


def test_what_another_gpu_would_use_is_no_error_on_this_one(
    run_of: Callable[..., AsyncEPConfig], caplog: pytest.LogCaptureFixture
) -> None:
    """Where the server chose by the GPU's memory, the same command has to start on a smaller one."""
    run_of("--device", "cuda", "--dp-size", "2", "--asyncep-store-limit", "1GiB")
    assert "--asyncep-store-limit: only with" in caplog.text
    with pytest.raises(UsageError, match=r"--asyncep-verify: only with several hosts .*leave the flag out"):
        run_of("--device", "cuda", "--dp-size", "2", "--asyncep-verify", "off")


# Where the settings are named; others have attributes of the same names.
OWNERS = {"settings", "run", "group", "batches", "front", "router", "options", "asked"}


def test_somebody_reads_each_setting() -> None:
    package = Path(asyncep_sgl.__file__).parent
    read = {
        node.attr
        for file in package.rglob("*.py")
        if file.parent.name != "config"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and (getattr(node.value, "attr", None) or getattr(node.value, "id", None)) in OWNERS
    }
    # By the property that makes seconds of it, and by the method that fills in the automatic value.
    through = {"max_wait_ms": "max_wait_seconds", "max_prompt_chars": "prompt_chars"}
    for _, name, flag in FLAGS:
        assert through.get(name, name) in read, flag.name


def test_names_are_each_ones_own() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(flag.help and not flag.help.endswith(".") for _, _, flag in FLAGS)


@pytest.mark.parametrize(("group", "name", "flag"), FLAGS, ids=NAMES)
def test_a_number_out_of_bounds_is_refused_by_name(group: type, name: str, flag: Declared) -> None:
    default = default_of(group, name)
    bounds = [(flag.least, -1.0), (flag.above, 0.0), (flag.most, 1.0)]
    wrong = [f"{bound + beyond:.12g}" for bound, beyond in bounds if bound is not None]
    for text in [*wrong, *(("inf", "nan") if isinstance(default, float) else ())]:
        parser = argparse.ArgumentParser()
        add_flags(parser.add_argument_group("x"), group)
        try:
            known = parser.parse_args([f"{flag.name}={text}"])
        except SystemExit:
            continue  # no number of that kind, such as a negative size
        with pytest.raises(UsageError, match=f"{flag.name} .*must be"):
            read_flags(known, group)


def test_the_recipe_for_a_new_setting() -> None:
    """As `docs/internals/recipes.md` has it: a field is all that a flag, its help, its bound and its way need."""

    @dataclass(frozen=True, kw_only=True)
    class More(RunSettings):
        grain: int = setting(16, "N", "tokens of a grain", least=1)

    parser = argparse.ArgumentParser()
    add_flags(parser.add_argument_group("asyncep"), More)
    assert "--asyncep-grain N" in parser.format_help()
    assert "tokens of a grain (default 16)" in parser.format_help()
    assert read_flags(parser.parse_args([]), More).grain == 16
    assert read_flags(parser.parse_args(["--asyncep-grain", "8"]), More).grain == 8
    with pytest.raises(UsageError, match="--asyncep-grain 0: must be at least 1"):
        read_flags(parser.parse_args(["--asyncep-grain", "0"]), More)


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--load-balance-method", "round_robin", "--asyncep-max-wait-ms", "5"], "--asyncep-max-wait-ms"),
        (["--load-balance-method", "round_robin", "--asyncep-log-decisions"], "--asyncep-log-decisions"),
        (
            ["--nnodes", "2", "--dist-init-addr", "h:1", "--asyncep-log-decisions"],
            "--asyncep-log-decisions",
        ),
    ],
)
def test_flags_of_a_router_that_is_not_there_are_refused(arguments: list[str], flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag}: for the router inside the server"):
        parse(["--model", "m", *arguments])
