"""Pages told together leave the router with the same view as pages told one by one."""

from __future__ import annotations

import copy
import random
from array import array
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.disaggregation import kv_events as theirs

from asyncep_router.kv_events import decode_batch
from asyncep_router.radix import SharedRadixTree
from asyncep_sgl.rank.cache_events import joined

PAGE = 2
BUDGET = 10**6
# Two letters, so that prompts begin alike and continue one another.
prompts = st.lists(st.integers(0, 1), max_size=12).map(tuple)


def stored(prompt: tuple[int, ...], skip: int, salt: str | None = None) -> list[Any]:
    """SGLang's events of a prompt whose first pages are there already: one a page, hashes of all up to it."""
    events = []
    for end in range(PAGE * (skip + 1), len(prompt) + 1, PAGE):
        parent = None if end == PAGE else hash(prompt[: end - PAGE])
        events.append(
            theirs.BlockStored(
                [hash(prompt[:end])], parent, list(prompt[end - PAGE : end]), PAGE, None, medium="GPU", cache_salt=salt
            )
        )
    return events


def view(events: list[Any]) -> SharedRadixTree:
    """After these events, as they arrive from rank 0."""
    tree = SharedRadixTree(BUDGET, PAGE)
    payload = msgspec.msgpack.encode(theirs.KVEventBatch(ts=0.0, events=events))
    for event in decode_batch(payload).events:
        tree.apply_event(0, event)
    tree.check_integrity()
    return tree


@given(st.lists(st.tuples(prompts, st.booleans()), max_size=12), prompts)
@settings(max_examples=200, deadline=None)
def test_the_view_is_the_same(actions: list[tuple[tuple[int, ...], bool]], probe: tuple[int, ...]) -> None:
    events: list[Any] = []
    held: set[tuple[int, ...]] = set()
    for prompt, remove in actions:
        pages = [prompt[:end] for end in range(PAGE, len(prompt) + 1, PAGE)]
        if remove and pages and pages[-1] in held:
            events.append(theirs.BlockRemoved([hash(pages[-1])], medium="GPU"))
            # What continues a removed block goes along.
            held = {page for page in held if page[: len(pages[-1])] != pages[-1]}
        elif not remove:
            events += stored(prompt, sum(page in held for page in pages))
            held.update(pages)
    together = joined(copy.deepcopy(events))
    assert len(together) <= len(events)
    one, other = view(events), view(together)
    for question in [probe, *(prompt for prompt, _ in actions)]:
        tokens = array("q", question)
        expected = max((len(page) for page in held if question[: len(page)] == page), default=0)
        assert one.match(tokens).held_by(0) == other.match(tokens).held_by(0) == expected


def test_a_prompt_is_one_event_and_sglangs_own_are_left_alone() -> None:
    prompt = tuple(random.Random(1).choices(range(100), k=64))
    events = stored(prompt, 0)
    before = copy.deepcopy(events)
    (event,) = joined(events)
    assert events == before
    assert event.token_ids == list(prompt)
    assert event.block_hashes == [each for one in before for each in one.block_hashes]
    assert event.parent_block_hash is None


def test_only_what_continues_in_the_same_namespace_is_joined() -> None:
    plain, salted = stored((1,) * 8, 0), stored((1,) * 8, 0, "salt")
    assert len(joined([*plain[:2], *salted[2:]])) == 2
    assert len(joined([plain[0], plain[2]])) == 2
    cleared = theirs.AllBlocksCleared()
    assert joined([plain[0], cleared, plain[1]]) == [plain[0], cleared, plain[1]]
