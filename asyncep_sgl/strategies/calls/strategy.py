"""Tokens travel, or weights, as the launcher, the router and the front see it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from asyncep_sgl.config.flags import changed
from asyncep_sgl.config.run import LARGEST_BATCH_TOKENS
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


class _ExpertCalls(OverHosts):
    """Each host keeps a part of the experts and computes others' rows. No rank waits for another rank."""

    _fetches: ClassVar[bool]

    @classmethod
    def refuse(cls, options: ServeOptions, group: GroupConfig) -> None:
        """One host, operators that would compute a layer whole, and flags about gathers where there are none."""
        name = options.run.strategy
        if group.nodes == 1:
            raise UsageError(
                f"--asyncep-strategy {name}: rows are sent to other hosts; give --nnodes N, or leave the flag out"
            )
        if options.run.kernels != "ours":
            raise UsageError("--asyncep-kernels sglang: only our kernels leave rows to others; leave the flag out")
        if cls._fetches:
            return
        for flag in changed(options.group):
            if flag.name in _OF_GATHERS:
                raise UsageError(f"{flag.name}: --asyncep-strategy {name} gathers nothing ahead; leave the flag out")

    def side_processes(self) -> Sequence[SideProcess]:
        """The exporter, and what computes other hosts' rows."""
        found = super().side_processes()
        if not found:
            return ()
        return (*found, SideProcess("worker", (sys.executable, "-m", "asyncep_sgl.experts.calls.worker")))

    def collectors(self, status: Callable[[], Status]) -> Sequence[Collector]:
        """The ranks' calls, the worker's, and the ranks' gathers if there are any."""
        from asyncep_sgl.strategies.asyncep.gather_metrics import GatherCollector
        from asyncep_sgl.strategies.calls.call_metrics import CallCollector

        found: list[Collector] = [CallCollector(status)]
        if self._fetches:
            found.append(GatherCollector(lambda: status().gathers))
        return found


class ExpertParallel(_ExpertCalls):
    """``ep``: rows always travel."""

    name = "ep"
    _fetches = False

    def rank(self, place: RankPlace) -> RankStrategy:
        """A rank that sends."""
        from asyncep_sgl.strategies.calls.rank import CallingRank, send_all

        return CallingRank(place, send_all, fetches=False)


class Auto(_ExpertCalls):
    """``auto``: weights travel ahead where the computation hides them, rows where it does not."""

    name = "auto"
    _fetches = True

    def sglang_flags(self) -> Sequence[str]:
        """As for AsyncEP: where there is much work, batches are cut by FLOPs."""
        return ("--chunked-prefill-size", str(LARGEST_BATCH_TOKENS), "--mem-fraction-static", "0.8")

    def rank(self, place: RankPlace) -> RankStrategy:
        """A rank that chooses by cost."""
        from asyncep_sgl.strategies.calls.rank import CallingRank, by_cost

        return CallingRank(place, by_cost, fetches=True)


class AtRandom(Auto):
    """``random:SEED``: what travels is drawn, for tests. The answers are the same."""

    name = "random"

    @classmethod
    def refuse(cls, options: ServeOptions, group: GroupConfig) -> None:
        """And a seed that is no number."""
        super().refuse(options, group)
        _seed(options.run.strategy or "")

    def rank(self, place: RankPlace) -> RankStrategy:
        """A rank that draws."""
        from asyncep_sgl.strategies.calls.rank import CallingRank, at_random

        return CallingRank(place, at_random(_seed(self.config.strategy) + place.rank), fetches=True)


def _seed(name: str) -> int:
    seed = name.partition(":")[2]
    if not seed.isdecimal():
        raise UsageError(f"--asyncep-strategy {name}: give a seed, such as random:1")
    return int(seed)
