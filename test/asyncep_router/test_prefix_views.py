"""The shared tree against brute force, and against SGLang's own cache reporting its events."""

from __future__ import annotations

import random
from array import array
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep_router.block_view import BlockView
from asyncep_router.errors import ConfigError
from asyncep_router.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

pytest.importorskip("sglang")
from asyncep_router.radix import SharedRadixTree

if TYPE_CHECKING:
    from asyncep_router.prefix import PrefixMatch, PrefixView

RANKS = 3
BIG = 10**9


class BruteForce:
    """Per rank, the set of page-aligned prefixes it holds."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.held: list[set[tuple[int, ...]]] = [set() for _ in range(RANKS)]

    def insert(self, rank: int, tokens: tuple[int, ...]) -> int:
        before = len(self.held[rank])
        for end in range(self.page, len(tokens) + 1, self.page):
            self.held[rank].add(tokens[:end])
        return (len(self.held[rank]) - before) * self.page

    def match(self, rank: int, tokens: tuple[int, ...]) -> int:
        longest = 0
        for end in range(self.page, len(tokens) + 1, self.page):
            if tokens[:end] in self.held[rank]:
                longest = end
        return longest


def _views(page: int, budget: int = BIG) -> list[PrefixView]:
    return [SharedRadixTree(budget, page), BlockView(budget, page)]


def _lengths(match: PrefixMatch) -> list[int]:
    lengths = [match.held_by(rank) for rank in range(RANKS)]
    assert match.by_rank() == {rank: n for rank, n in enumerate(lengths) if n}
    assert match.longest == max(lengths)
    return lengths


# A tiny alphabet and short prompts, so that prompts share, split and contain one another all the time.
prompts = st.lists(st.integers(0, 1), max_size=14).map(tuple)
steps = st.lists(
    st.tuples(st.sampled_from(["insert", "insert", "insert", "clear", "remove"]), st.integers(0, 2), prompts),
    max_size=25,
)


@given(st.sampled_from([1, 2, 3]), steps, prompts)
@settings(max_examples=150, deadline=None)
def test_views_equal_brute_force(page: int, actions: list[Any], probe: tuple[int, ...]) -> None:
    brute = BruteForce(page)
    views = _views(page)
    for action, rank, tokens in actions:
        for view in views:
            if action == "insert":
                assert view.insert(rank, array("q", tokens)) == _added(brute, rank, tokens)
            elif action == "clear":
                view.clear(rank)
            else:
                view.remove_rank(rank)
        if action == "insert":
            brute.insert(rank, tokens)
        else:
            brute.held[rank].clear()
        for view in views:
            view.check_integrity()
            for question in (tokens, probe):
                expected = [brute.match(r, question) for r in range(RANKS)]
                assert _lengths(view.match(array("q", question))) == expected
            assert [view.tokens_of(r) for r in range(RANKS)] == [len(h) * page for h in brute.held]
            assert view.total_tokens == len(set.union(*brute.held)) * page


def _added(brute: BruteForce, rank: int, tokens: tuple[int, ...]) -> int:
    return sum(
        brute.page for end in range(brute.page, len(tokens) + 1, brute.page) if tokens[:end] not in brute.held[rank]
    )


@given(st.sampled_from([1, 2]), steps, st.integers(20, 40), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_bounded_views_forget_but_never_invent(page: int, actions: list[Any], budget: int, capacity: int) -> None:
    brute = BruteForce(page)
    for view in _views(page, budget):
        view.set_capacity(1, capacity)
        for _, rank, tokens in actions:
            brute.insert(rank, tokens)
            view.insert(rank, array("q", tokens))
            view.check_integrity()
            assert view.total_tokens <= budget
            assert view.tokens_of(1) <= capacity
            for r, length in enumerate(_lengths(view.match(array("q", tokens)))):
                assert length <= brute.match(r, tokens)
            if rank != 1:  # what was just used is the last thing to go
                assert view.match(array("q", tokens)).held_by(rank) == len(tokens) // page * page


def test_least_recently_used_goes_first() -> None:
    for view in _views(2, budget=12):
        old, kept, new = (array("q", [n] * 6) for n in (1, 2, 3))
        view.insert(0, old)
        view.insert(1, kept)
        view.insert(0, old[:2])  # using a part keeps that part
        view.insert(0, new[:4])
        assert view.match(old).held_by(0) == 2
        assert view.match(kept).held_by(1) == 6
        assert view.evict(BIG) == view.total_tokens + 12
        assert view.total_tokens == 0


def test_namespaces_are_disjoint() -> None:
    for view in _views(2):
        view.insert(0, array("q", [1, 2, 3, 4]), "lora-a")
        assert view.match(array("q", [1, 2, 3, 4])).steps == ()
        assert view.match(array("q", [1, 2, 3, 4]), "lora-a").steps == ((4, 1),)


class _Allocator:
    """SGLang's cache frees its slots here when it evicts."""

    device = "cpu"

    def free_segment(self, _slots: Any, start_pos: int) -> None:
        pass


@given(
    st.sampled_from([1, 2]),
    st.lists(
        st.tuples(st.sampled_from(["store", "store", "evict", "reset"]), st.integers(0, 2), prompts),
        max_size=20,
    ),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_events_of_sglangs_own_caches_keep_the_view_exact(page: int, actions: list[Any], optimistic: bool) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    caches = [
        RadixCache.create_simulated(mock_allocator=_Allocator(), page_size=page, enable_kv_cache_events=True)
        for _ in range(RANKS)
    ]
    view = SharedRadixTree(BIG, page)
    seen: set[tuple[int, ...]] = set()
    for action, rank, tokens in actions:
        cache = caches[rank]
        if action == "store" and tokens:
            seen.add(tokens)
            if optimistic:
                view.insert(rank, array("q", tokens))
            cache.insert(InsertParams(key=RadixKey(array("q", tokens))))
        elif action == "evict":
            cache.evict(EvictParams(num_tokens=1 + len(tokens)))
        elif action == "reset":
            cache.reset()
        for event in cache.kv_events.take():
            view.apply_event(rank, _ours(event))
        view.check_integrity()
        for question in seen:
            for r in range(RANKS):
                found = caches[r].match_prefix(MatchPrefixParams(key=RadixKey(array("q", question))))
                assert view.match(array("q", question)).held_by(r) == found.device_prefix_len
    assert view.unplaced_events == 0


def _ours(event: Any) -> BlockStored | BlockRemoved | AllBlocksCleared:
    kind = type(event).__name__
    if kind == "BlockStored":
        return BlockStored(event.block_hashes, event.parent_block_hash, event.token_ids, event.block_size)
    return BlockRemoved(event.block_hashes) if kind == "BlockRemoved" else AllBlocksCleared()


def test_events_about_the_unknown_are_counted_and_harmless() -> None:
    view = SharedRadixTree(100, 2)
    view.apply_event(0, BlockStored([7], 99, [1, 2], 2))
    view.apply_event(0, BlockRemoved([5, 6]))
    view.apply_event(0, BlockStored([7], None, [1, 2], 2, cache_salt="s"))
    assert view.unplaced_events == 3
    view.apply_event(0, BlockStored([8], None, [1, 2], 2, medium="CPU_PINNED"))  # another tier
    assert view.total_tokens == 0
    with pytest.raises(ConfigError, match="pages of 4"):
        view.apply_event(0, BlockStored([8], None, [1, 2, 3, 4], 4))
    with pytest.raises(ConfigError, match="budget_tokens"):
        SharedRadixTree(0)


def test_a_long_random_run_stays_bounded() -> None:
    rng = random.Random(0)
    view = SharedRadixTree(50_000, 16)
    heads = [array("q", rng.choices(range(1000), k=256)) for _ in range(20)]
    for turn in range(3000):
        tokens = rng.choice(heads) + array("q", rng.choices(range(1000), k=rng.randrange(400)))
        view.insert(rng.randrange(8), tokens)
        assert view.total_tokens <= 50_000
        if turn % 500 == 0:
            view.check_integrity()
    view.check_integrity()
    assert len(view._recent) <= 50_000 // 16
