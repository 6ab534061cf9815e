"""What expert calls are made of, without sockets: messages, queue, merging, whom to ask, how long to wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncep_kernels.moe import cpu, cpu_native
from asyncep_kernels.moe.stages import Sorted
from asyncep_kernels.moe.table import ExpertTable
from asyncep_sgl.experts.calls.estimate import FIRST_SECONDS, LATE_SECONDS, MOST_SECONDS, Estimate, Trust
from asyncep_sgl.experts.calls.frames import fingerprint, on, raw
from asyncep_sgl.experts.calls.merge import Rows, merge
from asyncep_sgl.experts.calls.messages import Call, Shape, fault
from asyncep_sgl.experts.calls.owners import whom_to_ask
from asyncep_sgl.experts.calls.queue import CallQueue, Waiting

EXPERTS, WIDTH, INTER = 6, 64, 32
SHAPE = Shape(EXPERTS, WIDTH, 2)


def call(number: int = 1, *, oldest: int = 0, layer: int = 0, first: int = 0, counts: tuple[int, ...] = (1,)) -> Call:
    return Call(number=number, oldest=oldest, layer=layer, first=first, counts=counts, tokens=1)


@pytest.fixture(params=["native", "torch"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In C where this machine can, and by torch's operators."""
    if request.param == "native" and cpu_native.library() is None:
        pytest.skip("no C kernels for this CPU")
    if request.param == "torch":
        monkeypatch.setattr(cpu_native, "serves", lambda hidden, experts: False)


@st.composite
def callers(draw: st.DrawFn) -> list[Rows]:
    """Rows of one layer from several callers, for runs of experts of their own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, EXPERTS - 1))
        counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=EXPERTS - first))
        tokens = draw(st.integers(1, 60))
        order = torch.randint(0, tokens, (sum(counts),), generator=generator, dtype=torch.int32)
        hidden = torch.randn(tokens, WIDTH, generator=generator).bfloat16()
        found.append(Rows(first, counts, hidden, order))
    return found


def table() -> ExpertTable:
    generator = torch.Generator().manual_seed(5)
    w13 = torch.randn(EXPERTS, 2 * INTER, WIDTH, generator=generator) / 8
    w2 = torch.randn(EXPERTS, WIDTH, INTER, generator=generator) / 6
    return ExpertTable(w13.bfloat16(), w2.bfloat16())


def products(rows: list[Rows], part_rows: int) -> list[torch.Tensor]:
    """Each caller's products, computed together and handed out part by part."""
    merged = merge(rows, EXPERTS)
    total = sum(len(one.order) for one in rows)
    results = torch.full((total, WIDTH), float("nan"), dtype=torch.bfloat16)
    found = [torch.full((len(one.order), WIDTH), float("nan"), dtype=torch.bfloat16) for one in rows]
    for group in merged.groups(part_rows):
        cpu.run(merged.hidden, merged.order, table(), results, first=group.start, last=group.stop)
        for place in range(len(rows)):
            part = merged.part(place, group.start, group.stop)
            found[place][part.start : part.stop] = merged.products(results, place, part)
    return found


@pytest.mark.usefixtures("where")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(callers(), st.integers(1, 100))
def test_rows_give_the_same_bits_whoever_they_are_computed_with(rows: list[Rows], part_rows: int) -> None:
    together = products(rows, part_rows)
    for one, found in zip(rows, together, strict=True):
        (alone,) = products([one], 10_000)
        assert not found.isnan().any()
        assert torch.equal(found, alone)


@settings(max_examples=30)
@given(callers())
def test_a_row_is_its_experts_product_of_its_token(rows: list[Rows]) -> None:
    """Against each expert by itself, in plain torch."""
    experts = table()
    for one, found in zip(rows, products(rows, 50), strict=True):
        at = 0
        for expert, count in enumerate(one.counts, start=one.first):
            x = one.hidden[one.order[at : at + count].long()].float()
            gate, up = (x @ experts.w13[expert].float().T).chunk(2, dim=-1)
            exact = (torch.nn.functional.silu(gate) * up) @ experts.w2[expert].float().T
            assert (found[at : at + count].float() - exact).abs().max() <= 0.05 if count else True
            at += count


GOOD: dict[str, Any] = {"number": 1, "oldest": 1, "layer": 0, "first": 1, "counts": (2, 0, 1), "tokens": 2}


@pytest.mark.parametrize(
    ("changed", "hidden", "order", "words"),
    [
        ({}, 2 * WIDTH * 2, [0, 1, 1], None),
        ({"first": -1}, 2 * WIDTH * 2, [0, 1, 1], "experts -1 to 1 of 6"),
        ({"first": 4}, 2 * WIDTH * 2, [0, 1, 1], "experts 4 to 6 of 6"),
        ({"counts": ()}, 2 * WIDTH * 2, [], "experts 1 to 0 of 6"),
        ({"first": 0}, 2 * WIDTH * 2, [0, 1, 1], "are not all on this host"),
        ({"first": 0, "counts": (0, 2, 1)}, 2 * WIDTH * 2, [0, 1, 1], None),
        ({"counts": (2, 0, 2)}, 2 * WIDTH * 2, [0, 1, 1], "4 rows are announced and 3 came"),
        ({"counts": (4, -2, 1)}, 2 * WIDTH * 2, [0, 1, 1], "3 rows are announced and 3 came"),
        ({"tokens": 3}, 2 * WIDTH * 2, [0, 1, 1], "are not 3 hidden states"),
        ({"tokens": -1}, 0, [0, 1, 1], "are not -1 hidden states"),
        ({}, 2 * WIDTH * 2, [0, 2, 1], "beyond the 2 that came"),
        ({}, 2 * WIDTH * 2, [0, -1, 1], "beyond the 2 that came"),
    ],
)
def test_calls_that_cannot_be_computed(
    changed: dict[str, Any], hidden: int, order: list[int], words: str | None
) -> None:
    found = fault(Call(**{**GOOD, **changed}), SHAPE, frozenset({1, 2, 3}), hidden, np.array(order, dtype=np.int32))
    assert found is None if words is None else words in (found or "")


@given(
    st.integers(-2, 8), st.lists(st.integers(-2, 4), max_size=8), st.integers(-2, 5), st.integers(0, 900),
    st.lists(st.integers(-3, 6), max_size=8),
)  # fmt: skip
def test_the_kernel_is_never_sent_beyond_what_came(
    first: int, counts: list[int], tokens: int, hidden: int, order: list[int]
) -> None:
    made = Call(**{**GOOD, "first": first, "counts": tuple(counts), "tokens": tokens})
    if fault(made, SHAPE, frozenset(range(EXPERTS)), hidden, np.array(order, dtype=np.int32)) is None:
        assert first >= 0
        assert first + len(counts) <= EXPERTS
        assert all(count >= 0 for count in counts)
        assert sum(counts) == len(order)
        assert all(0 <= token < tokens for token in order)
        assert hidden == tokens * WIDTH * 2


def test_calls_for_one_layer_are_taken_together_and_the_oldest_first() -> None:
    queue: CallQueue[str] = CallQueue(most_rows=10)
    for name, layer, rows in (("a", 3, 4), ("b", 2, 1), ("c", 3, 6), ("d", 3, 1), ("e", 2, 50)):
        queue.add(Waiting(name.encode(), call(layer=layer, counts=(rows,)), name, 0.0))
    taken = [[entry.payload for entry in queue.take()] for _ in range(5)]
    assert taken == [["a", "c"], ["b"], ["d"], ["e"], []]


def test_what_nobody_waits_for_is_dropped() -> None:
    queue: CallQueue[int] = CallQueue()
    for caller, number, oldest in ((b"x", 1, 1), (b"y", 1, 1), (b"x", 2, 1), (b"x", 3, 3)):
        queue.add(Waiting(caller, call(number, oldest=oldest, layer=number), number, 0.0))
    left = []
    while taken := queue.take():
        left += [(entry.caller, entry.payload) for entry in taken]
    assert sorted(left) == [(b"x", 3), (b"y", 1)]
    assert queue.dropped == 2


@given(
    st.lists(st.sets(st.integers(0, 9)), min_size=2, max_size=5),
    st.sets(st.integers(0, 4)),
    st.sets(st.integers(0, 9)),
    st.data(),
)
def test_every_missing_expert_is_asked_for_once(
    held: list[set[int]], able: set[int], missing: set[int], data: st.DataObject
) -> None:
    nodes = len(held)
    node = data.draw(st.integers(0, nodes - 1))
    holders = {number: frozenset(experts) for number, experts in enumerate(held)}
    missing -= held[node]
    asked = whom_to_ask(frozenset(missing), holders, frozenset(able), node, nodes)
    assert sorted(expert for entry in asked for expert in entry.experts) == sorted(missing)
    assert len({other for other, _ in asked}) == len(asked)
    for other, experts in asked:
        assert list(experts) == sorted(experts)
        if other is None:
            assert not any(expert in holders[n] for n in able & set(range(nodes)) - {node} for expert in experts)
        else:
            assert other != node
            assert other in able
            assert set(experts) <= holders[other]


def test_experts_that_several_hosts_have_are_divided_among_them() -> None:
    """Three hosts with two copies each: a call for each host, not one for each expert."""
    holders = {0: frozenset(range(64)), 1: frozenset(range(32, 96)), 2: frozenset({*range(64, 96), *range(32)})}
    missing = frozenset(range(64, 96))
    asked = whom_to_ask(missing, holders, frozenset({0, 1, 2}), 0, 3)
    assert asked == ((1, tuple(range(64, 80))), (2, tuple(range(80, 96))))
    assert whom_to_ask(missing, holders, frozenset({2}), 0, 3) == ((2, tuple(range(64, 96))),)
    assert whom_to_ask(missing, holders, frozenset(), 0, 3) == ((None, tuple(range(64, 96))),)


def test_a_call_is_late_after_four_times_what_calls_take() -> None:
    estimate = Estimate()
    assert estimate.expected(100) is None
    assert estimate.late(100) == FIRST_SECONDS
    for _ in range(50):
        estimate.took(936, 1.0)
    assert estimate.expected(936) == pytest.approx(1.0)
    assert estimate.late(936) == pytest.approx(4.0)
    assert estimate.late(0) == pytest.approx(4 * 64 / 1000)
    for _ in range(500):
        estimate.took(936, 0.001)
    assert estimate.late(936) == LATE_SECONDS
    assert estimate.late(10**9) == MOST_SECONDS
    # What becomes slower is believed at once.
    estimate.took(936, 10.0)
    assert estimate.expected(936) == pytest.approx(5.0, rel=0.01)


def test_who_was_late_three_times_in_a_row_is_left_alone_for_a_while() -> None:
    trust = Trust()
    for _ in range(2):
        trust.missed(0.0)
        trust.missed(0.0)
        assert trust.may_be_asked(0.0)
        trust.answered()
    for _ in range(3):
        trust.missed(1.0)
    assert not trust.may_be_asked(5.9)
    assert trust.may_be_asked(6.0)


@given(st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=20))
def test_tensors_as_frames(values: list[float]) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.int32):
        tensor = torch.tensor(values).to(dtype)
        assert torch.equal(on(bytes(raw(tensor)), dtype, tuple(tensor.shape)), tensor)
        changed = bytearray(raw(tensor))
        changed[-1] ^= 1
        assert fingerprint(raw(tensor)) != fingerprint(changed)
        assert fingerprint(raw(tensor)[:3], raw(tensor)[3:]) == fingerprint(raw(tensor))
    assert on(b"", torch.bfloat16, (0, 5)).shape == (0, 5)


def test_the_order_of_one_caller_is_taken_as_it_is() -> None:
    order = torch.tensor([1, 0, 0], dtype=torch.int32)
    merged = merge([Rows(2, [1, 2], torch.zeros(2, WIDTH), order)], EXPERTS)
    assert isinstance(merged.order, Sorted)
    assert merged.order.tokens.data_ptr() == order.data_ptr()
    assert merged.order.starts.tolist() == [0, 0, 0, 1, 3, 3, 3]
    assert (merged.first, merged.last) == (2, 4)
