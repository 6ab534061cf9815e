"""Asynchronous expert parallelism with tokens that travel, as the launcher, the router and the front see it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from asyncep_sgl.config.flags import changed
from asyncep_sgl.errors import UsageError
from asyncep_sgl.strategies.base import SideProcess
from asyncep_sgl.strategies.hosts import OverHosts

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

    from asyncep_sgl.config.options import ServeOptions
    from asyncep_sgl.config.run import GroupConfig
    from asyncep_sgl.experts.store.messages import Status
    from asyncep_sgl.strategies.base import RankPlace, RankStrategy

# They say how weights are gathered ahead of the computation.
_OF_GATHERS = ("--asyncep-gather-depth", "--asyncep-margin", "--asyncep-log-gathers")


class ExpertParallel(OverHosts):
    """Each host keeps a part of the experts; their rows are sent there. No rank waits for another rank."""

    name = "ep"

    @classmethod
    def refuse(cls, options: ServeOptions, group: GroupConfig) -> None:
        """One host, operators that would compute a layer whole, and flags about gathers."""
        if group.nodes == 1:
            raise UsageError(
                "--asyncep-strategy ep: rows are sent to other hosts; give --nnodes N, or leave the flag out"
            )
        if options.run.kernels != "ours":
            raise UsageError("--asyncep-kernels sglang: only our kernels leave rows to others; leave the flag out")
        for flag in changed(options.group):
            if flag.name in _OF_GATHERS:
                raise UsageError(f"{flag.name}: --asyncep-strategy ep gathers nothing ahead; leave the flag out")

    def side_processes(self) -> Sequence[SideProcess]:
        """The exporter, and what computes other hosts' rows."""
        found = super().side_processes()
        if not found:
            return ()
        return (*found, SideProcess("worker", (sys.executable, "-m", "asyncep_sgl.experts.calls.worker")))

    def collectors(self, status: Callable[[], Status]) -> Sequence[Collector]:
        """The ranks' calls, and the worker's."""
        from asyncep_sgl.strategies.calls.call_metrics import CallCollector

        return (CallCollector(status),)

    def rank(self, place: RankPlace) -> RankStrategy:
        """A rank that sends."""
        from asyncep_sgl.strategies.calls.rank import CallingRank

        return CallingRank(place)
