"""All experts in memory that every rank of the host reads; nothing moves while it serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncep_sgl.errors import UsageError
from asyncep_sgl.strategies.base import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prometheus_client.registry import Collector

    from asyncep_sgl.config.options import ServeOptions
    from asyncep_sgl.config.run import GroupConfig
    from asyncep_sgl.experts.store.messages import Status
    from asyncep_sgl.strategies.base import RankPlace, RankStrategy


class Replicated(Strategy):
    """What `Strategy` does by itself."""

    name = "replicated"

    @classmethod
    def refuse(cls, options: ServeOptions, group: GroupConfig) -> None:
        """Everything that spreads the experts. SGLang's own operators serve as well."""
        cls._refuse_divided(options, group)
        if options.run.idle_ranks == "rest":
            if options.ranks == 1:
                raise UsageError(
                    "--asyncep-idle-ranks rest: with one rank there is none to help; leave the flag out, or give "
                    "--dp-size 2 or more"
                )
            if options.run.kernels == "sglang":
                raise UsageError(
                    "--asyncep-idle-ranks rest: with --asyncep-kernels sglang no rank helps another; leave the flag out"
                )

    def collectors(self, status: Callable[[], Status]) -> Sequence[Collector]:
        """How ranks help each other, where they may."""
        if not self._helps:
            return ()
        from asyncep_sgl.strategies.help_metrics import HelpCollector

        return (HelpCollector(status),)

    def rank(self, place: RankPlace) -> RankStrategy:
        """One that idle ranks help, where there are others and the C kernels serve."""
        # Imported only now: the launcher has no need of torch.
        from asyncep_kernels.native.library import library

        if not self._helps or library() is None:
            return super().rank(place)
        from asyncep_sgl.strategies.helped import HelpedRank

        return HelpedRank(place)

    @property
    def _helps(self) -> bool:
        config = self.config
        ours = config.transport == "host" and config.settings.kernels == "ours"
        # On a CPU that two ranks share, one's help would take from the other.
        apart = len(set().union(*config.cpus)) == sum(map(len, config.cpus))
        return ours and apart and config.ranks > 1 and config.settings.idle_ranks == "help"
