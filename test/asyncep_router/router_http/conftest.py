"""Processes for tests; every one started is ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from router_http.harness import NullWorker, RouterProcess


@pytest.fixture
def null_worker() -> Iterator[Callable[..., NullWorker]]:
    started: list[NullWorker] = []

    def start(ranks: int = 1, port: int = 0, chunk: int = 8192, flags: str = "") -> NullWorker:
        started.append(NullWorker(ranks, port, chunk, flags))
        return started[-1]

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Callable[..., RouterProcess]]:
    started: list[RouterProcess] = []

    def start(*workers: str, flags: str = "", environment: Mapping[str, str] | None = None) -> RouterProcess:
        log = tmp_path / f"router{len(started)}.log"
        started.append(RouterProcess(*workers, flags=flags, log=log, environment=environment))
        return started[-1]

    yield start
    for process in started:
        process.stop()
