"""Which host is asked for which run of a layer's experts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from asyncep_sgl.experts.gather.plan import choose
from asyncep_sgl.experts.shard.layout import runs


class Asked(NamedTuple):
    """A run of experts, and the host that is asked for it; None where no host may be."""

    node: int | None
    experts: range


def whom_to_ask(
    missing: frozenset[int], holders: Mapping[int, frozenset[int]], able: frozenset[int], node: int, nodes: int
) -> tuple[Asked, ...]:
    """Every missing expert once, from a host that has it and may be asked, evenly over those.

    Args:
        missing: experts of the layer that this host lacks.
        holders: experts of the layer that each host keeps.
        able: hosts that may be asked.
        node, nodes: this host, and how many there are.
    """
    open_to = {other: held for other, held in holders.items() if other in able and other != node}
    reachable = frozenset(expert for expert in missing if any(expert in held for held in open_to.values()))
    chosen = choose(sorted(reachable), open_to, node, nodes) or {}
    asked = [Asked(other, run) for other, experts in chosen.items() for run in runs(experts)]
    # Beginning with the next host, so that not all ask the same one first.
    asked.sort(key=lambda entry: ((entry.node or 0) - node - 1) % nodes)
    return (*asked, *(Asked(None, run) for run in runs(missing - reachable)))
