"""Which host is asked for which of a layer's experts. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple


class Asked(NamedTuple):
    """Experts, ascending, and the host that is asked for them; None where no host may be."""

    node: int | None
    experts: tuple[int, ...]


def whom_to_ask(
    wanted: Collection[int], holders: Mapping[int, frozenset[int]], able: frozenset[int], node: int, nodes: int
) -> tuple[Asked, ...]:
    """Every wanted expert once, from a host that has it and may be asked; one entry a host, because each is a call.

    Experts that the same hosts have are divided among these in equal pieces of neighbours.

    Args:
        wanted: experts of the layer whose rows are to be computed elsewhere.
        holders: experts of the layer that each host keeps.
        able: hosts that may be asked.
        node, nodes: this host, and how many there are.
    """
    # The next host first, so that not all ask the same one.
    others = sorted((n for n in able if n != node and n in holders), key=lambda n: (n - node - 1) % nodes)
    by_hosts: dict[tuple[int, ...], list[int]] = {}
    for expert in sorted(wanted):
        by_hosts.setdefault(tuple(n for n in others if expert in holders[n]), []).append(expert)
    asked: dict[int | None, list[int]] = {}
    for hosts, experts in by_hosts.items():
        pieces = len(hosts) or 1
        for number, host in enumerate(hosts or (None,)):
            piece = experts[len(experts) * number // pieces : len(experts) * (number + 1) // pieces]
            if piece:
                asked.setdefault(host, []).extend(piece)
    order = [*others, None]
    return tuple(Asked(host, tuple(sorted(asked[host]))) for host in order if host in asked)
