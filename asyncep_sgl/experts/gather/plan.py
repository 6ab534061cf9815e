"""Which bytes of which host a layer's gather takes, and where in a slot they go. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asyncep_sgl.experts.shard.layout import runs

# Experts that can be computed while later ones come: each wave costs a request, so there are few, and none is small.
_MOST_WAVES = 4
_LEAST_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A run of experts of one tensor from one host. ``offset`` and ``nbytes`` are within the slot."""

    node: int
    name: str
    experts: range
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SlotLayout:
    """Where a layer's missing experts lie in a slot: tensor after tensor, in each the experts in ascending order.

    Attributes:
        experts: the missing experts.
        strides: bytes of one expert of each tensor.
    """

    experts: tuple[int, ...]
    strides: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return len(self.experts) * sum(self.strides.values())

    def offset(self, name: str, expert: int) -> int:
        """First byte of one expert of one tensor."""
        start = 0
        for other in sorted(self.strides):
            if other == name:
                return start + self.experts.index(expert) * self.strides[name]
            start += len(self.experts) * self.strides[other]
        raise KeyError(name)


def choose(
    experts: Sequence[int], holders: Mapping[int, frozenset[int]], reader: int, nodes: int
) -> dict[int, frozenset[int]] | None:
    """From which host to take which expert: evenly over those that hold it, ties to the next host after the reader.

    Args:
        experts: what is wanted.
        holders: experts of each host that can be read now.
        reader: the reading host.
        nodes: hosts of the group.

    Returns:
        experts by host, or None if one is nowhere to be had.
    """
    chosen: dict[int, set[int]] = {}
    # Those with the fewest holders first: the others then fill up what is left.
    order = sorted(experts, key=lambda e: (sum(e in held for held in holders.values()), e))
    for expert in order:
        able = [node for node, held in holders.items() if expert in held]
        if not able:
            return None
        best = min(able, key=lambda node: (len(chosen.get(node, ())), (node - reader) % nodes))
        chosen.setdefault(best, set()).add(expert)
    return {node: frozenset(found) for node, found in chosen.items()}


def pieces(layout: SlotLayout, chosen: Mapping[int, frozenset[int]]) -> list[Piece]:
    """The fewest reads that fill a slot, by `choose`'s choice. Runs that are neighbours in memory on both sides."""
    found = []
    for node, experts in sorted(chosen.items()):
        for run in runs(experts):
            for name in sorted(layout.strides):
                stride = layout.strides[name]
                found.append(Piece(node, name, run, layout.offset(name, run.start), len(run) * stride))
    return found


def waves(experts: Sequence[int], nbytes: int) -> list[tuple[int, ...]]:
    """Experts in the order given, cut into pieces of about one size that come one after the other.

    Args:
        experts: what is wanted.
        nbytes: of one expert.
    """
    count = max(1, min(_MOST_WAVES, len(experts), len(experts) * nbytes // _LEAST_BYTES))
    bounds = [len(experts) * number // count for number in range(count + 1)]
    return [tuple(experts[start:stop]) for start, stop in itertools.pairwise(bounds) if start < stop]
