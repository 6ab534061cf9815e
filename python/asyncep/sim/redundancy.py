"""What serving a set of prompts really cost, against computing everything they share once. Pure.

Takes what ranks report of each request (tokens found in the prefix cache, which rank), so that it judges any router.
Shared is every whole page that, with all before it, begins two prompts or more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncep_router.block_chain import block_chain
from asyncep_router.block_view import BlockView

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from asyncep.sim.workloads import TimedPrompt
    from asyncep_router.cost import ModelCost


@dataclass(frozen=True)
class Placement:
    """What a run cost.

    Attributes:
        cached_share: tokens found cached over prompt tokens.
        flops: computed by all ranks together.
        flops_ratio: those over the bound in which whatever is shared is computed once.
        prefix_ratio: FLOPs inside shared prefixes over computing each once; nan if nothing is shared.
        imbalance: FLOPs of the busiest rank over the mean of `ranks` ranks.
        flops_by_rank: FLOPs of each rank that computed anything.
    """

    cached_share: float
    flops: int
    flops_ratio: float
    prefix_ratio: float
    imbalance: float
    flops_by_rank: dict[str, int]


class Redundancy:
    """The bounds of a set of prompts, worked out once. `page`: tokens by which the ranks' caches share."""

    def __init__(self, prompts: Sequence[TimedPrompt], page: int, cost: ModelCost) -> None:
        self._cost = cost
        self._lengths = [len(prompt.token_ids) for prompt in prompts]
        chains = [block_chain(prompt.token_ids, page) for prompt in prompts]
        owners = Counter(link for chain in chains for link in chain)
        # Of each prompt: leading tokens that some other prompt begins with too. Its last token is always computed.
        self.shared = [
            min(sum(owners[link] > 1 for link in chain), (length - 1) // page) * page
            for chain, length in zip(chains, self._lengths, strict=True)
        ]
        depth = {link: at for chain in chains for at, link in enumerate(chain) if owners[link] > 1}
        self.prefix_bound = sum(cost.flops(page, at * page, logits=0) for at in depth.values())
        self.bound = lower_bound_flops(prompts, page, cost)

    def judge(self, cached: Sequence[int], ranks: Sequence[Hashable], rank_count: int) -> Placement:
        """Raises `ValueError` unless there is one entry for each prompt, in order.

        Args:
            cached: tokens of each prompt that its rank found in its cache.
            ranks: the rank that computed it.
            rank_count: ranks there are, idle ones included.
        """
        by_rank: Counter[str] = Counter()
        prefix = 0
        for length, shared, held, rank in zip(self._lengths, self.shared, cached, ranks, strict=True):
            by_rank[str(rank)] += self._cost.flops(length - held, held)
            if held < shared:
                prefix += self._cost.flops(shared - held, held, logits=0)
        total = sum(by_rank.values())
        return Placement(
            cached_share=sum(cached) / sum(self._lengths),
            flops=total,
            flops_ratio=total / self.bound,
            prefix_ratio=prefix / self.prefix_bound if self.prefix_bound else float("nan"),
            imbalance=max(by_rank.values()) * rank_count / total,
            flops_by_rank=dict(by_rank),
        )


def lower_bound_flops(prompts: Sequence[TimedPrompt], page: int, cost: ModelCost) -> int:
    """FLOPs if one endless cache served all prompts in order of arrival: nothing is computed twice."""
    cache = BlockView(1 << 62, page)
    total = 0
    for prompt in prompts:
        chain = block_chain(prompt.token_ids, page)
        length = len(prompt.token_ids)
        held = min(cache.match_chain(chain).longest, (length - 1) // page * page)
        total += cost.flops(length - held, held)
        cache.insert_chain(0, chain)
    return total
