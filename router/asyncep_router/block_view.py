"""The prefix view on a dictionary of block hashes: exact to a block, needs nothing but Python.

Used where SGLang is not wanted: as the ranks' own caches in the simulator, for simulations of many
ranks, and as an independent reference for the tree. A prompt of n tokens costs n / block dictionary
operations, where the tree pays per branching point: for small pages the tree is the faster one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from asyncep_router.block_chain import block_chain
from asyncep_router.errors import ConfigError, IntegrityError
from asyncep_router.kv_events import AllBlocksCleared, KVEvent
from asyncep_router.prefix import PrefixMatch
from asyncep_router.ranks import members

if TYPE_CHECKING:
    from array import array


class BlockView:
    """A `PrefixView` whose pages are blocks of `page_size` tokens.

    `budget_tokens`: tokens stored at most, blocks held by several ranks counted once.
    """

    def __init__(self, budget_tokens: int, page_size: int = 64) -> None:
        if budget_tokens < page_size:
            raise ConfigError(f"budget_tokens={budget_tokens!r}: less than a page of {page_size}")
        self._page = page_size
        self._budget = budget_tokens // page_size
        self._ranks: OrderedDict[int, int] = OrderedDict()  # block -> ranks; order is recency
        self._held: dict[int, OrderedDict[int, None]] = {}
        self._capacity: dict[int, int] = {}
        self._version = 0

    @property
    def page_size(self) -> int:
        return self._page

    @property
    def version(self) -> int:
        return self._version

    @property
    def total_tokens(self) -> int:
        return len(self._ranks) * self._page

    def match(self, token_ids: array[int], namespace: str | None = None) -> PrefixMatch:
        return self.match_chain(block_chain(token_ids, self._page, namespace))

    def match_chain(self, chain: tuple[int, ...]) -> PrefixMatch:
        """As `match`, for a prompt whose blocks are hashed already."""
        steps: list[tuple[int, int]] = []
        holding = -1
        length = 0
        for block in chain:
            ranks = self._ranks.get(block, 0)
            dropped = holding & ~ranks
            if dropped and length:
                steps.append((length, dropped))
            holding &= ranks
            if not holding:
                break
            length += self._page
        if length and holding:
            steps.append((length, holding))
        steps.reverse()
        return PrefixMatch(tuple(steps))

    def insert(self, rank: int, token_ids: array[int], namespace: str | None = None) -> int:
        return self.insert_chain(rank, block_chain(token_ids, self._page, namespace))

    def insert_chain(self, rank: int, chain: tuple[int, ...]) -> int:
        """As `insert`, for a prompt whose blocks are hashed already."""
        held = self._held.setdefault(rank, OrderedDict())
        bit = 1 << rank
        before = len(held)
        for block in reversed(chain):  # deepest first, so that the front of the list is always a leaf
            self._ranks[block] = self._ranks.get(block, 0) | bit
            self._ranks.move_to_end(block)
            held[block] = None
            held.move_to_end(block)
        added = len(held) - before
        self._version += 1
        capacity = self._capacity.get(rank)
        while capacity is not None and len(held) > capacity:
            self._drop(rank, next(iter(held)))
        if len(self._ranks) > self._budget:
            self.evict((len(self._ranks) - self._budget) * self._page)
        return added * self._page

    def tokens_of(self, rank: int) -> int:
        return len(self._held.get(rank, ())) * self._page

    def set_capacity(self, rank: int, tokens: int | None) -> None:
        if tokens is None:
            self._capacity.pop(rank, None)
            return
        if tokens < 0:
            raise ConfigError(f"capacity of rank {rank}={tokens!r}: must be at least 0")
        self._capacity[rank] = tokens // self._page
        held = self._held.get(rank, OrderedDict())
        while len(held) > self._capacity[rank]:
            self._drop(rank, next(iter(held)))

    def evict(self, tokens: int) -> int:
        gone = 0
        while gone < tokens and self._ranks:
            block, ranks = self._ranks.popitem(last=False)
            for rank in members(ranks):
                del self._held[rank][block]
            gone += self._page
        self._version += 1
        return gone

    def clear(self, rank: int) -> None:
        for block in list(self._held.get(rank, ())):
            self._drop(rank, block)

    def remove_rank(self, rank: int) -> None:
        self.clear(rank)
        self._held.pop(rank, None)
        self._capacity.pop(rank, None)

    def apply_event(self, rank: int, event: KVEvent) -> None:
        """Only a flush: the ranks' block hashes are not ours, so stores and removals name nothing here."""
        if isinstance(event, AllBlocksCleared):
            self.clear(rank)

    def check_integrity(self) -> None:
        for rank, held in self._held.items():
            booked = {block for block, ranks in self._ranks.items() if ranks >> rank & 1}
            if booked != set(held):
                raise IntegrityError(f"rank {rank}: {len(held)} blocks held, {len(booked)} booked")
        if len(self._ranks) > self._budget:
            raise IntegrityError(f"{len(self._ranks)} blocks, budget {self._budget}")

    def _drop(self, rank: int, block: int) -> None:
        del self._held[rank][block]
        left = self._ranks[block] & ~(1 << rank)
        if left:
            self._ranks[block] = left
        else:
            del self._ranks[block]
        self._version += 1
