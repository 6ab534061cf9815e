"""The view of what every rank's KV cache holds: the interface, without an implementation.

`radix.py` implements it on SGLang's radix tree, `block_view.py` on a dictionary of block hashes.
A view is a hint: it may be wrong in both directions for the length of a batch, and a wrong hint costs
time, never a wrong answer. It is optimistic: a prompt counts as held from its dispatch on, so that ten
requests with one prefix that arrive together are charged for it once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from asyncep_router.ranks import members

if TYPE_CHECKING:
    from array import array

    from asyncep_router.kv_events import KVEvent


class PrefixMatch(NamedTuple):
    """How much of a prompt each rank holds.

    `steps`: (tokens, ranks as bits), longest first, rank sets disjoint, tokens above 0. Ranks in none
    of them hold nothing. There are at most as many steps as levels in the tree, usually one or two.
    """

    steps: tuple[tuple[int, int], ...]

    @property
    def longest(self) -> int:
        """Tokens held by whoever holds most."""
        return self.steps[0][0] if self.steps else 0

    def held_by(self, rank: int) -> int:
        """Tokens that `rank` holds."""
        bit = 1 << rank
        for length, ranks in self.steps:
            if ranks & bit:
                return length
        return 0

    def by_rank(self) -> dict[int, int]:
        """Tokens per rank, ranks that hold nothing left out."""
        return {rank: length for length, ranks in self.steps for rank in members(ranks)}


class PrefixView(Protocol):
    """Which page-aligned prefixes each rank holds. Ranks are small integers; a rank is known from its
    first `insert` or event on.

    A rank that holds a prefix holds every shorter one. Lengths are multiples of `page_size`.
    """

    @property
    def page_size(self) -> int:
        """Tokens a page; only whole pages are cached."""

    @property
    def version(self) -> int:
        """Grows with every change, so that a match can be reused while it is still true."""

    @property
    def total_tokens(self) -> int:
        """Tokens stored in the view itself: at most its budget after every call."""

    def match(self, token_ids: array[int], namespace: str | None = None) -> PrefixMatch:
        """Longest prefix per rank. Changes nothing, recency included."""

    def insert(self, rank: int, token_ids: array[int], namespace: str | None = None) -> int:
        """`rank` will hold this prompt; marks it as just used. Returns the tokens new to that rank."""

    def tokens_of(self, rank: int) -> int:
        """Tokens that `rank` is thought to hold."""

    def set_capacity(self, rank: int, tokens: int | None) -> None:
        """The size of the rank's cache: beyond it the rank's least recently used prefixes are dropped."""

    def evict(self, tokens: int) -> int:
        """Forget at least `tokens` least recently used tokens (all if fewer). Returns how many went."""

    def clear(self, rank: int) -> None:
        """The rank's cache was flushed."""

    def remove_rank(self, rank: int) -> None:
        """The rank is gone; forget its capacity too."""

    def apply_event(self, rank: int, event: KVEvent) -> None:
        """Correct the view by what the rank's cache reports of itself."""

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if the books disagree. For tests and idle moments: it walks everything."""
