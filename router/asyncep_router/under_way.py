"""What ranks are computing now: blocks that the view counts as held and that nobody can use yet."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence, Set


class UnderWay:
    """Per rank, the blocks (hashes of `block_chain`) that requests in flight are the first to compute there."""

    def __init__(self) -> None:
        self._computing: dict[int, dict[int, str]] = {}  # rank -> block -> request that computes it

    def begin(self, rank: int, rid: str, blocks: Sequence[int]) -> tuple[int, ...]:
        """A request for these blocks was sent. Returns those that nobody was computing before: they are its own."""
        computing = self._computing.setdefault(rank, {})
        own = tuple(block for block in blocks if block not in computing)
        computing.update(dict.fromkeys(own, rid))
        return own

    def end(self, rank: int, own: Sequence[int]) -> None:
        """A request left the rank, finished or not: its own blocks are there, or are not coming."""
        computing = self._computing.get(rank, {})
        for block in own:
            del computing[block]

    def computes(self, rank: int) -> bool:
        """Whether the rank is computing anything."""
        return bool(self._computing.get(rank))

    def blocks(self, rank: int) -> Set[int]:
        """All blocks that the rank is computing."""
        return self._computing.get(rank, {}).keys()

    def there(self, rank: int, chain: Sequence[int], depth: int) -> int:
        """Of the first `depth` blocks of a chain, which the rank holds or computes: how many it has computed."""
        computing = self._computing.get(rank, {})
        if not depth or chain[depth - 1] not in computing:
            return depth
        # What is being computed follows what is there, so the first such block can be searched for.
        return bisect_left(range(depth), True, key=lambda i: chain[i] in computing)

    def computed_by(self, rank: int, chain: Sequence[int]) -> str:
        """The request that computes the first block of a chain of which the rank computes any."""
        computing = self._computing[rank]
        return next(computing[block] for block in chain if block in computing)
