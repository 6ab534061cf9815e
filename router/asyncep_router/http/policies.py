"""The policy that `--policy` names."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from asyncep_router.baselines import BaselinePolicy, CacheAware, PowerOfTwo, Random, RoundRobin
from asyncep_router.block_view import BlockView
from asyncep_router.routing_policy import RoutingPolicy

if TYPE_CHECKING:
    from asyncep_router.cost import ModelCost
    from asyncep_router.http.options import RouterOptions
    from asyncep_router.policy import Policy
    from asyncep_router.prefix import PrefixView


def make_policy(options: RouterOptions, cost: ModelCost) -> Policy:
    """What `--policy` names.

    Ranks are small integers, one for every data-parallel rank behind every URL (`fleet.py` knows which).
    """
    if options.policy == "asyncep":
        return RoutingPolicy(cost, _view(options), options.limits)
    if options.policy == "cache_aware":
        return BaselinePolicy(
            lambda: CacheAware(
                options.cache_threshold, options.balance_abs_threshold, options.balance_rel_threshold, block=32
            ),
            cost,
        )
    if options.policy == "power_of_two":
        return BaselinePolicy(lambda: PowerOfTwo(random.getrandbits(32)), cost)
    if options.policy == "random":
        return BaselinePolicy(lambda: Random(random.getrandbits(32)), cost)
    return BaselinePolicy(RoundRobin, cost)


def _view(options: RouterOptions) -> PrefixView:
    if options.prefix_view == "radix":
        # Imports SGLang: seconds and a gigabyte that only this choice pays.
        from asyncep_router.radix import SharedRadixTree

        tree: PrefixView = SharedRadixTree(options.max_tree_size)
        return tree
    return BlockView(max(options.max_tree_size, options.prefix_block_tokens), options.prefix_block_tokens)
