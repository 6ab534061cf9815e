"""AsyncEP as the launcher, the router and the front see it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from asyncep_router.cost import ModelCost
from asyncep_sgl.config.run import LARGEST_BATCH_TOKENS
from asyncep_sgl.errors import UsageError
from asyncep_sgl.strategies.base import FrontPlace
from asyncep_sgl.strategies.hosts import OverHosts

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

    from asyncep_sgl.config.options import ServeOptions
    from asyncep_sgl.config.run import GroupConfig
    from asyncep_sgl.experts.store.messages import Status
    from asyncep_sgl.strategies.base import RankPlace, RankStrategy


class AsyncEP(OverHosts):
    """Weights are gathered layer by layer into slots, while earlier layers compute."""

    name = "asyncep"

    @classmethod
    def refuse(cls, options: ServeOptions, group: GroupConfig) -> None:
        """A run in which nothing could be gathered, and operators that would not see what was."""
        if not group.divides:
            raise UsageError(
                "--asyncep-strategy asyncep: all experts are in memory that every rank reads; leave the flag out, or "
                "give --asyncep-expert-memory SIZE (or --nnodes N on CPUs, --asyncep-transport pinned on GPUs)"
            )
        if options.run.kernels != "ours" and group.gathers:
            raise UsageError("--asyncep-kernels sglang: only our kernels read gathered experts; leave the flag out")

    def sglang_flags(self) -> Sequence[str]:
        """Batches are cut by FLOPs: their tokens are only the bound that memory sets.

        SGLang would keep memory free for a GPU's graphs in proportion to that, more than a small host has.
        """
        return ("--chunked-prefill-size", str(LARGEST_BATCH_TOKENS), "--mem-fraction-static", "0.8")

    @property
    def gathers(self) -> bool:
        """Unless every layer is kept whole."""
        return self.config.group.gathers

    def collectors(self, status: Callable[[], Status]) -> Sequence[Collector]:
        """The ranks' gathers."""
        if not self.gathers:
            return ()
        from asyncep_sgl.strategies.asyncep.gather_metrics import GatherCollector

        return (GatherCollector(lambda: status().gathers),)

    def first_work(self, place: FrontPlace) -> None:
        """T is measured before the first client comes."""
        if not self.gathers:
            return
        from asyncep_sgl.strategies.asyncep.calibration import calibrate

        cost = ModelCost.from_config(place.model)

        def hiding_tokens() -> int | None:
            known = [gather.saturation_flops for gather in place.status().gathers if gather.saturation_flops]
            if not known:
                return None
            return cost.tokens_within(cost.threshold_flops(statistics.fmean(known)))

        calibrate(
            place.url,
            ranks=self.config.ranks,
            vocabulary=place.model["vocab_size"],
            context=place.context,
            api_key=place.api_key,
            hiding_tokens=hiding_tokens,
        )

    def rank(self, place: RankPlace) -> RankStrategy:
        """A rank that gathers."""
        from asyncep_sgl.strategies.asyncep.rank import AsyncEPRank

        return AsyncEPRank(place)
