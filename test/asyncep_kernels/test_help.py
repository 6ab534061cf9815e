"""Experts computed by a rank and its helpers: the bits of `moe.cpu.moe`, whoever comes, leaves or never comes back."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int32

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncep_kernels.attention import cpu as attention
from asyncep_kernels.attention.batch import Batch as Sequences
from asyncep_kernels.attention.plan import plan
from asyncep_kernels.help import offer as offers
from asyncep_kernels.help.board import Board, board_bytes
from asyncep_kernels.help.offer import HELPER, OWNER, Done, Offer, attention_bytes, expert_bytes
from asyncep_kernels.help.visits import Visits, Weights, ring
from asyncep_kernels.moe import cpu, cpu_native
from asyncep_kernels.moe.table import ExpertTable

pytestmark = pytest.mark.skipif(cpu_native.library() is None, reason="no C kernels for this CPU")

LAYER = 3
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertTable]


def batch(tokens: int, k: int, experts: int, width: int, inter: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).bfloat16()
    ids = torch.randint(-1, experts, (tokens, k), generator=generator)
    weights = torch.rand(tokens, k, generator=generator)
    w13 = (torch.randn(experts, 2 * inter, width, generator=generator) / 8).bfloat16()
    w2 = (torch.randn(experts, width, inter, generator=generator) / 6).bfloat16()
    return hidden, ids, weights, ExpertTable(w13, w2)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    # Few rows an expert, and more than a block of them.
    tokens = draw(st.one_of(st.integers(1, 60), st.integers(500, 900)))
    experts, k = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    return batch(tokens, k, experts, 64, 32, draw(st.integers(0, 99)))


@pytest.fixture(autouse=True, scope="module")
def patience() -> Iterator[None]:
    """However busy the machine is: only one test is about patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offers, "LEAST_PATIENCE", 60.0)
        yield


class Host:
    """Ranks of one host as threads of this process: memory that all of them see."""

    def __init__(self, ranks: int) -> None:
        self.memory = mmap.mmap(-1, board_bytes(ranks))
        self.boards = [Board(self.memory, ranks, rank) for rank in range(ranks)]
        self._made: dict[int, list[mmap.mmap]] = {}

    def offer(self, rank: int, given: Batch) -> Offer:
        """A memory for batches of this size; the rank's next."""
        hidden, ids, _, experts = given
        return self.memory_of(rank, expert_bytes(len(hidden), ids.shape[1], len(experts.w13), hidden.shape[1]))

    def memory_of(self, rank: int, nbytes: int) -> Offer:
        """The rank's next memory."""
        memory = mmap.mmap(-1, nbytes)
        self._made.setdefault(rank, []).append(memory)
        self.boards[rank].publish(os.getpid(), len(self._made[rank]) - 1)
        return Offer(self.boards[rank], memory)

    @contextmanager
    def helper(self, rank: int, experts: ExpertTable) -> Iterator[None]:
        """A helping thread of an idle rank."""
        board, stop = self.boards[rank], c_int32(0)
        visits = Visits(board, Weights({LAYER: experts}))

        def serve() -> None:
            while (other := visits.help(stop)) >= 0:
                place = board.offer_place(other)
                visits.map(other, place.generation, self._made[other][place.descriptor])

        thread = threading.Thread(target=serve)
        thread.start()
        board.idle = True
        try:
            yield
        finally:
            board.idle, stop.value = False, 1
            ring(board)
            thread.join()


def computed(offer: Offer, given: Batch, cut: int = 0) -> tuple[torch.Tensor, list[Done]]:
    """What a rank gets of its offer, in one run of experts or in two."""
    hidden, ids, weights, experts = given
    order = cpu.sort(ids, len(experts.w13))
    results = offer.write_rows(LAYER, hidden, order, experts)
    results.fill_(float("nan"))
    bounds = [0, cut % len(experts.w13), len(experts.w13)]
    done = [offer.compute_rows(order, experts, *run) for run in itertools.pairwise(bounds)]
    return cpu.combine(results, order.place, weights, dtype=hidden.dtype), done


@given(given_batch=batches(), cut=st.integers(0, 8))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_bits_are_those_of_one_rank_alone(given_batch: Batch, cut: int) -> None:
    hidden, ids, weights, experts = given_batch
    host = Host(3)
    offer = host.offer(0, given_batch)
    alone = cpu.moe(hidden, ids, weights, experts)
    with host.helper(1, experts), host.helper(2, experts):
        for _ in range(3):
            found, done = computed(offer, given_batch, cut)
            assert torch.equal(found, alone)
            assert not any(one.left for one in done)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Sequences, int | None]:
    """Prompts, some of which share what is cached, and a window."""
    lengths = st.one_of(st.integers(0, 50), st.integers(250, 600))
    new = draw(st.lists(lengths, min_size=1, max_size=4).filter(any))
    shared = draw(st.integers(0, 80))
    slots, free = [], shared
    for tokens in new:
        own = draw(st.integers(0, 40))
        slots.append(torch.cat([torch.arange(shared), torch.arange(free, free + own + tokens)]))
        free += own + tokens
    prefix = [len(row) - tokens for row, tokens in zip(slots, new, strict=True)]
    return Sequences(new, prefix, slots), draw(st.sampled_from([None, 0, 30]))


@given(batch_and_window=sequences(), folds=st.sampled_from([1, 2, 3, 4, 5]), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_attention_has_the_bits_of_one_rank_alone(
    batch_and_window: tuple[Sequences, int | None], folds: int, seed: int
) -> None:
    sequences, window = batch_and_window
    generator = torch.Generator().manual_seed(seed)
    rows = max(int(row.max()) for row in sequences.slots if len(row)) + 1
    q = torch.randn(sequences.tokens, 2 * folds, 40, generator=generator).bfloat16()
    k, v = (torch.randn(rows, 2, width, generator=generator).bfloat16() for width in (40, 24))
    made = plan(sequences, window)
    alone = attention.attention(q, k, v, made, scale=0.2)
    host = Host(2)
    offer = host.memory_of(0, attention_bytes(q, v, made.native))
    with host.helper(1, ExpertTable(torch.empty(0), torch.empty(0))):
        for _ in range(3):
            out = torch.full_like(alone, float("nan"))
            done = offer.attention(q, k, v, made.native, scale=0.2, window=made.window, out=out)
            assert torch.equal(out, alone)
            assert not done.left


def test_idle_ranks_compute_a_part_and_busy_ones_nothing() -> None:
    given_batch = batch(tokens=1024, k=4, experts=16, width=256, inter=256)
    host = Host(2)
    offer = host.offer(0, given_batch)
    with host.helper(1, given_batch[3]):
        assert host.boards[0].others_idle()
        assert helped_within(offer, given_batch, tries=200) > 0
        host.boards[1].idle = False
        assert not host.boards[0].others_idle()
        computed(offer, given_batch)  # a block that was begun before
        assert helped_within(offer, given_batch, tries=10) == 0


def helped_within(offer: Offer, given: Batch, tries: int) -> int:
    """Blocks that others computed, of the first try in which they computed any."""
    for _ in range(tries):
        _, done = computed(offer, given)
        if done[-1].helped:
            return done[-1].helped
    return 0


def test_two_ranks_offer_at_once_and_one_helps_both() -> None:
    given_batch = batch(tokens=600, k=4, experts=16, width=128, inter=128)
    alone = cpu.moe(*given_batch)
    host = Host(3)
    made = [host.offer(rank, given_batch) for rank in range(2)]
    wrong: list[int] = []

    def ask(rank: int) -> None:
        wrong.extend(rank for _ in range(50) if not torch.equal(computed(made[rank], given_batch)[0], alone))

    with host.helper(2, given_batch[3]):
        threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_helper_that_never_comes_out_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has begun some blocks and is gone, and another goes on taking blocks: the rank computes all that are left."""
    given_batch = batch(tokens=300, k=2, experts=8, width=64, inter=32)
    host = Host(2)
    offer = host.offer(0, given_batch)
    hidden, ids, weights, experts = given_batch
    order = cpu.sort(ids, len(experts.w13))
    results = offer.write_rows(LAYER, hidden, order, experts)
    results.fill_(float("nan"))
    offer._header.inside = 1
    kernels = cpu_native.needed()

    class Begun:
        """The kernels, beside helpers that take blocks from the common counter and give nothing back."""

        def __getattr__(self, name: str) -> object:
            return getattr(kernels, name)

        def asyncep_help_open(self, *arguments: int) -> None:
            kernels.asyncep_help_open(*arguments)
            offer._header.next += 2

        def asyncep_help_compute(self, *arguments: int) -> int:
            offer._header.next += 1
            return int(kernels.asyncep_help_compute(*arguments))

    monkeypatch.setattr(offers, "on_threads", lambda run: run())
    monkeypatch.setattr(offers, "needed", Begun)
    monkeypatch.setattr(offers, "LEAST_PATIENCE", 0.05)
    began = time.monotonic()
    done = offer.compute_rows(order, experts, 0, len(experts.w13))
    assert time.monotonic() - began >= 0.05
    assert done == (8, 0, True)
    assert torch.equal(cpu.combine(results, order.place, weights, dtype=hidden.dtype), cpu.moe(*given_batch))


def test_a_rank_that_comes_anew_leaves_what_the_one_before_left_open() -> None:
    board = Host(2).boards[0]
    board.publish(1, 7)
    board.idle = True
    board._places[0].offered = 1
    board.leave()
    assert not board.idle
    assert board._places[0].offered == 0
    assert board.offer_place(0) == (1, 7, 1)


def test_the_marks_are_those_of_the_kernel() -> None:
    assert (OWNER, HELPER) == (1, 2)
    given_batch = batch(tokens=16, k=1, experts=2, width=32, inter=32)
    host = Host(1)
    offer = host.offer(0, given_batch)
    _, (first, whole) = computed(offer, given_batch)
    assert first.blocks == 0
    assert whole == (whole.blocks, 0, False)
    done = offer._tensor(offer._header.done, (whole.blocks,), torch.uint8)
    assert done.tolist() == [OWNER] * whole.blocks


@pytest.mark.parametrize("ranks", [1, 63, 64, 200])
def test_the_page_has_room_for_all_ranks(ranks: int) -> None:
    memory = mmap.mmap(-1, board_bytes(ranks))
    boards = [Board(memory, ranks, rank) for rank in range(ranks)]
    for board in boards:
        board.idle = board.rank % 2 == 0
        board.publish(board.rank, 7)
    assert [board.idle for board in boards] == [rank % 2 == 0 for rank in range(ranks)]
    assert [boards[0].offer_place(rank) for rank in range(ranks)] == [(rank, 7, 1) for rank in range(ranks)]
