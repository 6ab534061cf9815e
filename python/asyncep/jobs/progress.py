"""A job's progress: a bar on a terminal, a line every few seconds elsewhere. Rate, time left, MFU, cached share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from asyncep.jobs.spec import Progress

_LINE_SECONDS = 5.0


class ShownProgress(Protocol):
    """Shows what it is told, for the length of a ``with``."""

    def __enter__(self) -> ShownProgress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def tell(self, progress: Progress) -> None:
        """Takes the run's figures."""
        ...


def shown_progress(console: Console, count: Callable[[], int], peak: float | None) -> ShownProgress:
    """What suits the console.

    Args:
        count: how many rows there are. They are counted meanwhile in a thread: the file may be long.
        peak: FLOPs a second at best, for MFU; None leaves MFU out.
    """
    return _Bar(console, count, peak) if console.is_terminal else _Lines(console, count, peak)


def figures(progress: Progress, peak: float | None) -> list[str]:
    """Rate, cached share and MFU in words. An MFU above 1 says that the peak is not this machine's, and is left out."""
    shown = [f"{progress.rate:,.1f} rows/s", f"{progress.cached_share:.0%} cached"]
    if peak and 0 < progress.flops_per_second <= peak:
        shown.append(f"MFU {progress.flops_per_second / peak:.1%}")
    return shown


class _Bar:
    def __init__(self, console: Console, count: Callable[[], int], peak: float | None) -> None:
        self._peak = peak
        self._bar = Bar(
            TextColumn("classifying"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", total=None, figures="")
        self._counter = threading.Thread(target=lambda: self._bar.update(self._task, total=count()), daemon=True)

    def __enter__(self) -> _Bar:
        self._bar.start()
        self._counter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def tell(self, progress: Progress) -> None:
        self._bar.update(self._task, completed=progress.rows, figures="  ".join(figures(progress, self._peak)))


class _Lines:
    def __init__(self, console: Console, count: Callable[[], int], peak: float | None) -> None:
        self._console, self._peak = console, peak
        self._total: int | None = None
        self._last: Progress | None = None
        self._told = time.monotonic()
        self._counter = threading.Thread(target=lambda: setattr(self, "_total", count()), daemon=True)

    def __enter__(self) -> _Lines:
        self._counter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last is not None:
            self._print(self._last)

    def tell(self, progress: Progress) -> None:
        self._last = progress
        if time.monotonic() - self._told >= _LINE_SECONDS:
            self._told = time.monotonic()
            self._print(progress)

    def _print(self, progress: Progress) -> None:
        parts = [f"{progress.rows:,}{f' of {self._total:,}' if self._total is not None else ''} rows"]
        parts += figures(progress, self._peak)
        if self._total is not None and progress.rate and progress.rows < self._total:
            parts.append(f"{timedelta(seconds=round((self._total - progress.rows) / progress.rate))} left")
        self._console.print("classifying: " + ", ".join(parts), markup=False, highlight=False, soft_wrap=True)
