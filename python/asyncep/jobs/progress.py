"""A job's progress on the terminal: rate, time left, MFU, cached share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from asyncep.jobs.spec import Progress


class ProgressBar:
    """Shows what it is told. The rows are counted meanwhile in a thread: the file may be long.

    Args:
        count: how many rows there are; None is shown until it has returned.
        peak: FLOPs a second at best, for MFU; None leaves MFU out.
    """

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

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        self._counter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def tell(self, progress: Progress) -> None:
        """Takes the run's figures."""
        figures = [f"{progress.rate:,.1f} rows/s", f"{progress.cached_share:.0%} cached"]
        if self._peak and progress.flops_per_second:
            figures.append(f"MFU {progress.flops_per_second / self._peak:.1%}")
        self._bar.update(self._task, completed=progress.rows, figures="  ".join(figures))
