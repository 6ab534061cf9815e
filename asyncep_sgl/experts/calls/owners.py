"""Which host is asked for which run of a layer's experts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from asyncep_sgl.experts.shard.layout import runs


class Asked(NamedTuple):
    """A run of experts, and the host that is asked for it; None where no host may be."""

    node: int | None
    experts: range


def whom_to_ask(
    missing: frozenset[int], holders: Mapping[int, frozenset[int]], able: frozenset[int], node: int, nodes: int
) -> tuple[Asked, ...]:
    """Every missing expert once, from a host that has it and may be asked; in few runs, because each is a call.

    Experts that the same hosts have are divided among these in equal pieces.

    Args:
        missing: experts of the layer that this host lacks.
        holders: experts of the layer that each host keeps.
        able: hosts that may be asked.
        node, nodes: this host, and how many there are.
    """
    # The next host first, so that not all ask the same one.
    others = sorted((n for n in able if n != node and n in holders), key=lambda n: (n - node - 1) % nodes)
    by_hosts: dict[tuple[int, ...], set[int]] = {}
    for expert in missing:
        by_hosts.setdefault(tuple(n for n in others if expert in holders[n]), set()).add(expert)
    asked = []
    for hosts, experts in by_hosts.items():
        for run in runs(frozenset(experts)):
            bounds = [run.start + len(run) * piece // max(1, len(hosts)) for piece in range(len(hosts) + 1)]
            pieces = zip(hosts, bounds, bounds[1:], strict=False)
            asked += [Asked(host, range(start, stop)) for host, start, stop in pieces if start < stop]
            if not hosts:
                asked.append(Asked(None, run))
    return tuple(sorted(asked, key=lambda entry: others.index(entry.node) if entry.node is not None else nodes))
