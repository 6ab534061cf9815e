"""What tests share: models, and servers that are stopped whatever happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import tiny_models
from server import Server, start_asyncep, start_stock
from xdist.scheduler import LoadScopeScheduling

# Stock SGLang leaves names in /dev/shm. Files that start it, and those that look there for what is left, run one after
# the other where the rest runs in two processes.
ONE_AFTER_THE_OTHER = frozenset(
    {
        "test_against_a_server.py",
        "test_faults.py",
        "test_http_stock.py",
        "test_one_server.py",
        "test_processes.py",
        "test_quick_modes.py",
        "test_store.py",
    }
)

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("steady", deadline=None)
hypothesis.settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where two processes share the tests, files that start servers come first: they are long."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        with_servers = {item.path for item in items if item.get_closest_marker("server")}
        items.sort(key=lambda item: item.path not in with_servers)


class WholeFiles(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """A file's tests run in one process, so that what its fixtures start is started once."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return "one after the other" if Path(file).name in ONE_AFTER_THE_OTHER else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> WholeFiles | None:
    """Groups by mark (``--dist loadgroup``) have no effect with the locked versions of pytest and xdist."""
    return WholeFiles(config, log) if config.getvalue("dist") == "loadscope" else None


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds each architecture's checkpoint once."""
    built: dict[str, Path] = {}

    def model(architecture: str = "qwen3_moe") -> Path:
        if architecture not in built:
            built[architecture] = tiny_models.build(architecture, tmp_path_factory.mktemp(architecture))
        return built[architecture]

    return model


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts ``asyncep serve``; every server it started is stopped at the end of the module."""
    started: list[Server] = []
    # Stock SGLang leaves a file of its load figures in shared memory with each start; ours leaves nothing, and
    # test_faults.py checks that.
    left_by_stock = set(Path("/dev/shm").glob("sglang_loads_*"))
    stock_used = False

    def starter(model: Path, *arguments: str, ranks: int = 2, stock: bool = False) -> Server:
        nonlocal stock_used
        stock_used |= stock
        log = tmp_path_factory.mktemp("server") / "log.txt"
        server = start_stock(model, log, *arguments) if stock else start_asyncep(model, log, *arguments, ranks=ranks)
        started.append(server)
        return server

    yield starter
    for server in started:
        server.stop()
    for file in set(Path("/dev/shm").glob("sglang_loads_*")) - left_by_stock if stock_used else ():
        file.unlink(missing_ok=True)
