"""Which rank owns which expert. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertLayout:
    """Each rank owns one contiguous run of every layer's experts, equal up to one.

    Where ``ranks`` does not divide ``experts`` the runs that are one longer move from layer to layer, so that
    over the whole model no rank owns (or reads) more than its share by more than one expert.

    Attributes:
        experts: experts of one layer, at least 1.
        ranks: ranks of the group, at least 1; may exceed ``experts`` (some ranks then own nothing in a layer).
    """

    experts: int
    ranks: int

    def __post_init__(self) -> None:
        if self.experts < 1 or self.ranks < 1:
            raise ValueError(f"a layout needs experts and ranks, got {self.experts} and {self.ranks}")

    def owned(self, layer: int, rank: int) -> range:
        """The experts of ``layer`` that ``rank`` owns, possibly none.

        Raises:
            IndexError: no such rank.
        """
        if not 0 <= rank < self.ranks:
            raise IndexError(f"rank {rank} outside 0..{self.ranks - 1}")
        base, extra = divmod(self.experts, self.ranks)
        # Turning the ranks' order by `extra` each layer hands the longer runs round in a full cycle.
        place = (rank - layer * extra) % self.ranks
        start = place * base + min(place, extra)
        return range(start, start + base + (place < extra))

    def owner(self, layer: int, expert: int) -> int:
        """The rank that owns ``expert`` of ``layer``.

        Raises:
            IndexError: no such expert.
        """
        if not 0 <= expert < self.experts:
            raise IndexError(f"expert {expert} outside 0..{self.experts - 1}")
        base, extra = divmod(self.experts, self.ranks)
        longer = extra * (base + 1)
        place = expert // (base + 1) if expert < longer else extra + (expert - longer) // base
        return (place + layer * extra) % self.ranks


@dataclass(frozen=True)
class GroupLayout:
    """Which host keeps which experts in memory, and which of its ranks reads them from the checkpoint.

    A group is ``nodes`` hosts with ``ranks`` ranks each. An expert's first home is the host of the rank that owns it in
    the `ExpertLayout` over all ranks; its copies are on the hosts that follow.

    Attributes:
        experts: experts of one layer.
        nodes: hosts of the group, at least 1.
        ranks: ranks of each host, at least 1.
        copies: hosts that keep each expert, 1 to ``nodes``.
        resident: layers that every host keeps whole.
        on_disk: layers that no host keeps: they are read from the checkpoint each time.
        kept: experts that a host keeps of every layer beyond its share, so that less has to be gathered.
    """

    experts: int
    nodes: int
    ranks: int
    copies: int = 1
    resident: frozenset[int] = frozenset()
    on_disk: frozenset[int] = frozenset()
    kept: int = 0

    def __post_init__(self) -> None:
        if self.nodes < 1 or not 1 <= self.copies <= self.nodes:
            raise ValueError(f"{self.copies} copies of each expert on {self.nodes} hosts")
        if self.kept < 0:
            raise ValueError(f"{self.kept} experts kept beyond a host's share")

    def read_by(self, layer: int, node: int, rank: int) -> frozenset[int]:
        """The experts of ``layer`` that ``rank`` (within its host) takes from the checkpoint.

        Raises:
            IndexError: no such host or rank.
        """
        if not (0 <= node < self.nodes and 0 <= rank < self.ranks):
            raise IndexError(f"rank {rank} of host {node} outside {self.nodes} x {self.ranks}")
        beyond = self._beyond_share(layer, node)
        return self._share(layer, node, rank) | frozenset(beyond[rank :: self.ranks])

    def _share(self, layer: int, node: int, rank: int) -> frozenset[int]:
        if layer in self.on_disk:
            return frozenset()
        if layer in self.resident:
            return frozenset(ExpertLayout(self.experts, self.ranks).owned(layer, rank))
        over_all = ExpertLayout(self.experts, self.nodes * self.ranks)
        homes = ((node - copy) % self.nodes for copy in range(self.copies))
        return frozenset(e for home in homes for e in over_all.owned(layer, home * self.ranks + rank))

    def _beyond_share(self, layer: int, node: int) -> list[int]:
        """The first experts after the host's own, cyclically: each host keeps others."""
        share = frozenset().union(*(self._share(layer, node, rank) for rank in range(self.ranks)))
        first = node * self.experts // self.nodes
        rest = sorted(frozenset(range(self.experts)) - share, key=lambda expert: (expert - first) % self.experts)
        return rest[: self.kept]

    def held(self, layer: int, node: int) -> frozenset[int]:
        """The experts of ``layer`` that lie in ``node``'s memory."""
        return frozenset().union(*(self.read_by(layer, node, rank) for rank in range(self.ranks)))

    def missing(self, layer: int, node: int) -> frozenset[int]:
        """The experts of ``layer`` that ``node`` has to gather from other hosts."""
        return frozenset(range(self.experts)) - self.held(layer, node)


def runs(experts: frozenset[int]) -> tuple[range, ...]:
    """``experts`` as ascending ranges, as few as possible."""
    found: list[range] = []
    for expert in sorted(experts):
        if found and found[-1].stop == expert:
            found[-1] = range(found[-1].start, expert + 1)
        else:
            found.append(range(expert, expert + 1))
    return tuple(found)
