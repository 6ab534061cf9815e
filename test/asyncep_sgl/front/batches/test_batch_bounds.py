"""The pure parts: who uses how much, whose turn it is, and how large answers will be."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep_router.keys import Caller
from asyncep_sgl.errors import UsageError
from asyncep_sgl.front.batches.bounds import Bounds, Ledger, Promise, names_of
from asyncep_sgl.front.batches.disk import Disk, NoSpace
from asyncep_sgl.front.batches.estimates import answer_bytes, prompts
from asyncep_sgl.front.batches.records import ENDPOINTS, ApiError
from asyncep_sgl.front.batches.turns import Turns
from asyncep_sgl.launcher.command_line import parse

CALLERS = [Caller("ann"), Caller("bob", file_bytes=300), Caller("cid"), Caller("boss", admin=True)]


@given(st.lists(st.tuples(st.sampled_from(CALLERS), st.integers(-400, 400)), max_size=60))
def test_nobody_takes_more_than_the_quota_and_something_is_left(steps: list[tuple[Caller, int]]) -> None:
    ledger, held = Ledger(Bounds(file_bytes=1000)), Counter[str]()
    for caller, size in steps:
        if size < 0:
            given_back = min(-size, held[caller.name])
            held[caller.name] -= given_back
            ledger.give(caller.name, given_back)
            continue
        why = ledger.beyond(caller, size)
        if why is not None:
            assert "file_bytes" in why or "--asyncep-file-quota" in why
            with pytest.raises(ApiError, match=re.escape(why)):
                ledger.take(caller, size)
        else:
            ledger.take(caller, size)
            held[caller.name] += size
            # Who has just taken some has left as much to everybody else.
            if caller.file_bytes is None and not caller.admin:
                assert held[caller.name] <= 1000 - held.total()
        assert ledger.used == held
        assert held.total() <= 1000
        assert held["bob"] <= 300


@pytest.mark.parametrize("name", ["", "default"])
def test_who_is_alone_may_have_all(name: str) -> None:
    ledger = Ledger(Bounds(file_bytes=1000))
    ledger.take(Caller(name), 1000)
    with pytest.raises(ApiError, match="--asyncep-file-quota"):
        ledger.take(Caller(name), 1)


def test_whose_files_a_caller_sees() -> None:
    assert names_of(Caller("")) == ("",)
    assert names_of(Caller("ann")) == ("ann",)
    assert names_of(Caller("default")) == ("default", "")
    assert names_of(Caller("boss", admin=True)) is None


@given(
    st.integers(0, 10**9), st.integers(1, 50_000), st.integers(0, 50_000), st.integers(0, 10**9), st.integers(0, 10**12)
)
def test_a_promise_is_never_less_than_what_is_needed_to_end(
    estimate: int, total: int, answers: int, size: int, room: int
) -> None:
    promise = Promise.of("ann", estimate, total, min(answers, total), size)
    assert size <= promise.finish <= promise.files <= promise.disk
    ledger = Ledger(Bounds())
    begun = ledger.hold(Caller("ann"), promise, room) is None
    assert begun == (promise.disk <= room)
    ledger.promise("b1", promise)
    assert (ledger.promised, ledger.to_finish) == (promise.disk, promise.finish)
    # What others will write is as good as written.
    assert (ledger.hold(Caller("bob"), promise, room) is None) == (2 * promise.disk <= room)
    ledger.settle("b1")
    assert ledger.promised == 0


def test_one_owners_batches_leave_space_to_others() -> None:
    ledger, promise = Ledger(Bounds()), Promise("ann", 300, 100, 50)
    begun = 0
    while ledger.hold(Caller("ann"), promise, 1000) is None:
        begun += 1
        ledger.promise(f"b{begun}", promise)
    assert begun == 1
    assert "other batches" in (ledger.hold(Caller("ann"), promise, 1000) or "")
    assert ledger.hold(Caller("bob"), promise, 1000) is None


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(1, 12), st.booleans()), max_size=8),
    st.integers(1, 5),
)
def test_turns(flows: list[tuple[str, str, int, bool]], places: int) -> None:
    """Never more than there are places, alone means alone, and everybody is served."""
    under_way, alone_now, served = 0, False, 0

    async def flow(turns: Turns, owner: str, batch: str, count: int, alone: bool) -> None:
        nonlocal under_way, alone_now, served
        for _ in range(count):
            await turns.enter(owner, batch, alone=alone)
            under_way += 1
            assert not alone_now
            assert under_way == 1 if alone else under_way <= places
            alone_now = alone
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            alone_now = False
            under_way -= 1
            served += 1
            turns.leave(owner, batch)

    async def run() -> None:
        turns = Turns(places)
        async with asyncio.TaskGroup() as group:
            for one in flows:
                group.create_task(flow(turns, *one))
        assert not turns._held
        assert turns._under_way == 0

    asyncio.run(run())
    assert served == sum(count for _, _, count, _ in flows)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=8), st.integers(1, 3))
def test_a_turn_that_is_cancelled_is_nobodys(steps: list[int], places: int) -> None:
    async def run() -> None:
        turns = Turns(places)
        tasks = [asyncio.create_task(turns.enter("a", str(number), alone=number == 3)) for number in range(7)]
        for step in steps:
            await asyncio.sleep(0)
            tasks[step].cancel()
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        for number, outcome in enumerate(done):
            if outcome is None:
                turns.leave("a", str(number))
        assert turns._under_way == 0
        async with asyncio.timeout(10):
            await turns.enter("b", "x", alone=True)

    asyncio.run(run())


def test_an_owner_with_one_batch_has_as_many_turns_as_one_with_ten() -> None:
    order: list[str] = []

    async def flow(turns: Turns, owner: str, batch: int, count: int) -> None:
        for _ in range(count):
            await turns.enter(owner, str(batch))
            order.append(owner)
            await asyncio.sleep(0)
            turns.leave(owner, str(batch))

    async def run() -> None:
        turns = Turns(1)
        async with asyncio.TaskGroup() as group:
            for batch in range(10):
                group.create_task(flow(turns, "many", batch, 20))
            group.create_task(flow(turns, "one", 0, 20))

    asyncio.run(run())
    assert order[:40].count("one") == pytest.approx(20, abs=1)


FIELDS = """input items label_token_ids text input_ids token_ids_logprob logprob_start_len return_logprob
    top_logprobs_num prompt echo logprobs top_logprobs query documents"""
BODY = st.dictionaries(
    st.sampled_from(FIELDS.split()),
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=9),
    max_size=8,
)


@given(st.sampled_from(ENDPOINTS), BODY, st.integers(1, 10**7))
def test_any_body_has_an_estimate(endpoint: str, body: dict[str, Any], length: int) -> None:
    assert 0 < answer_bytes(endpoint, body, length) < 10**12


@pytest.mark.parametrize(
    ("endpoint", "body", "count"),
    [
        ("/generate", {"input_ids": list(range(400))}, 1),
        ("/generate", {"input_ids": [[1, 2], [3]]}, 2),
        ("/generate", {"text": ["a", "b", "c"]}, 3),
        ("/v1/completions", {"prompt": [1, 2, 3]}, 1),
        ("/v1/completions", {"prompt": ["a", "b"]}, 2),
        ("/v1/embeddings", {"input": [5] * 2000}, 1),
        ("/v1/score", {"query": "q", "items": ["a", "b"]}, 2),
        ("/v1/rerank", {"query": "q", "documents": ["a"] * 4}, 4),
        ("/v1/chat/completions", {"messages": [{}, {}]}, 1),
    ],
)
def test_a_list_of_ids_is_one_prompt(endpoint: str, body: dict[str, Any], count: int) -> None:
    assert prompts(endpoint, body) == count
    longer = {key: value * 10 if isinstance(value, list) else value for key, value in body.items()}
    if count == 1:
        assert answer_bytes(endpoint, longer, 1000) == answer_bytes(endpoint, body, 1000)


def test_echoed_prompts_take_more() -> None:
    plain = answer_bytes("/v1/completions", {"prompt": "x" * 1000, "logprobs": 1}, 1000)
    assert plain < 2000
    assert answer_bytes("/v1/completions", {"prompt": "x" * 1000, "logprobs": 1, "echo": True}, 1000) > 10 * plain


def test_the_floor_of_a_disk(tmp_path: Path) -> None:
    disk = Disk(tmp_path, floor=2**60)
    assert disk.room() < 0
    with pytest.raises(NoSpace, match="--asyncep-disk-floor") as refused:
        disk.need(1)
    assert str(tmp_path) not in refused.value.message
    Disk(tmp_path, floor=0).need(1)
    # The reserve counts as taken whether it is there or given up.
    ballast = tmp_path / "ballast"
    disk.restore()
    size = ballast.stat().st_size
    # It is given up in pieces, so that it serves many deletes.
    for _ in range(10):
        assert ballast.exists()
        disk.release()
    assert 0 < ballast.stat().st_size < size / 2
    disk.restore()
    assert ballast.stat().st_size == size
    for _ in range(16):
        disk.release()
    assert not ballast.exists()
    disk.release()


def test_flags() -> None:
    options = parse(["--model", "m"])
    assert (options.batches.file_bytes, options.batches.file_days, options.batches.disk_floor) == (20 * 10**9, 30, None)
    flags = "--asyncep-file-quota 5GB --asyncep-file-days 0 --asyncep-disk-floor 2GiB"
    options = parse(["--model", "m", *flags.split()])
    assert (options.batches.file_bytes, options.batches.file_days, options.batches.disk_floor) == (5 * 10**9, 0, 2**31)
    for wrong in ("--asyncep-file-quota=-1", "--asyncep-file-days=-1", "--asyncep-disk-floor=-1"):
        with pytest.raises(UsageError, match=wrong.partition("=")[0]):
            parse(["--model", "m", wrong])
