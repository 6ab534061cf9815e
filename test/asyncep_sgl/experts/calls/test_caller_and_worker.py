"""A caller and a worker over real sockets, in one process: right, late, declined, wrong, and gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import zmq
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from asyncep_kernels.moe import cpu
from asyncep_kernels.moe.table import ExpertTable
from asyncep_sgl.experts.calls import caller as caller_module
from asyncep_sgl.experts.calls import worker as worker_module
from asyncep_sgl.experts.calls.caller import Caller, Sent
from asyncep_sgl.experts.calls.messages import Answer, Shape
from asyncep_sgl.experts.calls.worker import LayerExperts, Worker
from asyncep_sgl.experts.group.peers import NodeView, View

EXPERTS, WIDTH, INTER, LAYER = 8, 64, 32, 3
OWN, AWAY = range(4), range(4, 8)


def experts() -> ExpertTable:
    generator = torch.Generator().manual_seed(5)
    w13 = torch.randn(EXPERTS, 2 * INTER, WIDTH, generator=generator) / 8
    w2 = torch.randn(EXPERTS, WIDTH, INTER, generator=generator) / 6
    return ExpertTable(w13.bfloat16(), w2.bfloat16())


class Views:
    """In the place of a line to the exporter: what it would say of node 1's worker."""

    def __init__(self) -> None:
        self.address = ""

    def ask(self) -> None:
        """Nothing is sent."""

    def answer(self, seconds: float = 0.0) -> View:
        del seconds
        return View((NodeView(1, "tcp://nowhere", True, None, self.address),), ())

    def close(self) -> None:
        """Nothing is open."""


class Served:
    """A worker in a thread, on a port of its own."""

    def __init__(self, *, verify: bool = True) -> None:
        self.socket = zmq.Context().socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind("tcp://127.0.0.1:*")
        self.address = str(self.socket.getsockopt_string(zmq.LAST_ENDPOINT))
        held = LayerExperts(experts(), frozenset(AWAY), Shape(EXPERTS, WIDTH, 2), torch.bfloat16)
        self.worker = Worker(self.socket, {LAYER: held}, verify=verify)
        # Held by whoever wants the worker to stand still.
        self.still, self.end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self.end.wait(0.001):
            with self.still:
                self.worker.turn(0.02)

    def stop(self) -> None:
        self.end.set()
        self._thread.join()
        self.socket.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests share two cores with others: what is not about being late is not late."""
    monkeypatch.setattr(caller_module, "LATE_SECONDS", 30.0)


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.stop()


@pytest.fixture
def caller(served: Served) -> Iterator[Caller]:
    views = Views()
    views.address = served.address
    made = Caller(views, verify=True)  # type: ignore[arg-type]
    made.refresh()
    yield made
    made.close()


def layer(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(tokens)])
    return hidden, ids, torch.rand(tokens, 3, generator=generator)


def send(
    caller: Caller, hidden: torch.Tensor, order: Any, *, of: int = LAYER, run: Sequence[int] = AWAY
) -> Sent | None:
    """The rows of some experts, wherever between the others they stand."""
    starts = order.starts.tolist()
    places = [range(starts[expert], starts[expert + 1]) for expert in run]
    tokens = torch.cat([order.tokens[place.start : place.stop] for place in places])
    distinct, of_distinct = torch.unique(tokens, return_inverse=True)
    counts = {expert: len(place) for expert, place in zip(run, places, strict=True)}
    return caller.send(1, of, counts, places, hidden[distinct.long()], of_distinct.to(torch.int32))


def sent_at_last(caller: Caller, *given: Any, **how: Any) -> Sent:
    """A connection takes a moment to come about."""
    deadline = time.monotonic() + 10
    while (found := send(caller, *given, **how)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("tokens", [1, 40, 3000])
def test_rows_that_went_there_and_back_are_those_of_here(caller: Caller, served: Served, tokens: int) -> None:
    """Many tokens come back in parts."""
    hidden, ids, weights = layer(tokens)
    whole = cpu.moe(hidden, ids, weights, experts())
    order = cpu.sort(ids, EXPERTS)
    results = torch.full((ids.numel(), WIDTH), float("nan"), dtype=torch.bfloat16)
    for _ in range(3):
        caller.begin()
        call = sent_at_last(caller, hidden, order)
        cpu.run(hidden, order, experts(), results, first=OWN.start, last=OWN.stop)
        assert caller.collect([call], results) == []
        assert torch.equal(cpu.combine(results, order.place, weights, dtype=hidden.dtype), whole)
    counts = caller.counts
    assert (counts.late, counts.declined, counts.digest_failures) == (0, 0, 0)
    assert (
        counts.rows
        == served.worker.served.rows
        == 3 * (order.rows(AWAY.start, AWAY.stop).stop - order.rows(4, 8).start)
    )
    assert served.worker.served.calls == 3


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 300), st.sets(st.sampled_from(list(AWAY)), min_size=1), st.integers(0, 99), st.integers(1, 60))
def test_any_of_the_others_experts_may_be_sent(
    caller: Caller, tokens: int, away: set[int], seed: int, part_rows: int
) -> None:
    """The rest is computed here, and each row comes to its place in however many parts."""
    hidden, ids, weights = layer(tokens, seed)
    order = cpu.sort(ids, EXPERTS)
    starts = order.starts.tolist()
    assume(any(starts[expert] < starts[expert + 1] for expert in away))
    results = torch.full((ids.numel(), WIDTH), float("nan"), dtype=torch.bfloat16)
    caller.begin()
    with mock.patch.object(worker_module, "_PART_BYTES", part_rows * WIDTH * 2):
        call = sent_at_last(caller, hidden, order, run=sorted(away))
        for expert in set(range(EXPERTS)) - away:
            cpu.run(hidden, order, experts(), results, first=expert, last=expert + 1)
        assert caller.collect([call], results) == []
    whole = cpu.moe(hidden, ids, weights, experts())
    assert torch.equal(cpu.combine(results, order.place, weights, dtype=hidden.dtype), whole)


def test_an_answer_says_how_busy_its_host_is(caller: Caller, served: Served) -> None:
    served.worker._busy = lambda: 0.75
    assert caller.busy() == 0.0
    hidden, ids, _ = layer(20)
    order = cpu.sort(ids, EXPERTS)
    caller.begin()
    call = sent_at_last(caller, hidden, order)
    caller.collect([call], torch.zeros((ids.numel(), WIDTH), dtype=torch.bfloat16))
    assert caller.busy() == 0.75
    call.line.trust.until = float("inf")
    assert caller.busy() == 1.0  # nobody may be asked


def test_calls_of_several_callers_are_computed_in_one_run(served: Served) -> None:
    views = Views()
    views.address = served.address
    made = [Caller(views, verify=True) for _ in range(3)]  # type: ignore[arg-type]
    under_way = []
    with served.still:
        for seed, one in enumerate(made):
            one.refresh()
            hidden, ids, weights = layer(50, seed)
            order = cpu.sort(ids, EXPERTS)
            results = torch.zeros((ids.numel(), WIDTH), dtype=torch.bfloat16)
            one.begin()
            under_way.append((one, hidden, ids, weights, order, results, sent_at_last(one, hidden, order)))
        deadline = time.monotonic() + 10
        while len(served.worker.queue) < 3 and time.monotonic() < deadline:
            served.worker.admit()
    for one, hidden, ids, weights, order, results, call in under_way:
        assert one.collect([call], results) == []
        cpu.run(hidden, order, experts(), results, first=OWN.start, last=OWN.stop)
        whole = cpu.moe(hidden, ids, weights, experts())
        assert torch.equal(cpu.combine(results, order.place, weights, dtype=hidden.dtype), whole)
        one.close()
    assert (served.worker.served.runs, served.worker.served.calls) == (1, 3)


def test_a_worker_that_stands_still_is_given_up_and_its_late_answer_harms_nothing(
    caller: Caller, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncep_sgl.experts.calls.estimate.FIRST_SECONDS", 0.1)
    monkeypatch.setattr(caller_module, "LATE_SECONDS", 0.05)
    hidden, ids, weights = layer(20)
    order = cpu.sort(ids, EXPERTS)
    results = torch.zeros((ids.numel(), WIDTH), dtype=torch.bfloat16)
    with served.still:
        caller.begin()
        call = sent_at_last(caller, hidden, order)
        assert caller.collect([call], results) == [call]
    assert caller.counts.late == 1
    # Another layer's rows: the answer to the first call comes among them, and is nobody's.
    hidden, ids, weights = layer(30, seed=1)
    order = cpu.sort(ids, EXPERTS)
    results = torch.zeros((ids.numel(), WIDTH), dtype=torch.bfloat16)
    monkeypatch.setattr(caller_module, "LATE_SECONDS", 30.0)
    caller.begin()
    assert caller.collect([sent_at_last(caller, hidden, order)], results) == []
    cpu.run(hidden, order, experts(), results, first=OWN.start, last=OWN.stop)
    assert torch.equal(
        cpu.combine(results, order.place, weights, dtype=hidden.dtype), cpu.moe(hidden, ids, weights, experts())
    )


@pytest.mark.parametrize(
    ("how", "words"),
    [({"of": 9}, "no experts of layer 9 are here"), ({"run": range(2, 8)}, "are not all on this host")],
)
def test_what_a_worker_cannot_compute_is_declined_at_once(
    caller: Caller, how: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    hidden, ids, _ = layer(20)
    order = cpu.sort(ids, EXPERTS)
    results = torch.zeros((ids.numel(), WIDTH), dtype=torch.bfloat16)
    caller.begin()
    call = sent_at_last(caller, hidden, order, **how)
    assert caller.collect([call], results) == [call]
    assert caller.counts.declined == 1
    assert words in caplog.text


@pytest.mark.parametrize("side", ["hidden states", "products"])
def test_what_changes_on_its_way_is_seen(
    caller: Caller, side: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each side compares what came with the other's digest."""
    true: Callable[..., int] = caller_module.fingerprint
    # A call is of two frames, an answer of one.
    spoilt, of = {"hidden states": (caller_module, 2), "products": (worker_module, 1)}[side]
    monkeypatch.setattr(spoilt, "fingerprint", lambda *frames: true(*frames) ^ (len(frames) == of))
    hidden, ids, _ = layer(20)
    order = cpu.sort(ids, EXPERTS)
    results = torch.zeros((ids.numel(), WIDTH), dtype=torch.bfloat16)
    caller.begin()
    call = sent_at_last(caller, hidden, order)
    assert caller.collect([call], results) == [call]
    assert caller.counts.declined == 1
    assert caller.counts.digest_failures == (side == "products")
    assert "came otherwise than it was sent" in caplog.text


def test_what_came_while_the_rank_computed_is_not_late(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that was; and nothing is learned from it but that it was no longer."""
    monkeypatch.setattr("asyncep_sgl.experts.calls.estimate.FIRST_SECONDS", 0.01)
    hidden, ids, _ = layer(20)
    order = cpu.sort(ids, EXPERTS)
    results = torch.zeros((ids.numel(), WIDTH), dtype=torch.bfloat16)
    caller.begin()
    call = sent_at_last(caller, hidden, order)
    time.sleep(0.3)
    monkeypatch.setattr(caller_module, "LATE_SECONDS", 0.0)
    assert caller.collect([call], results) == []
    assert caller.counts.late == 0


def test_a_call_that_is_given_up_teaches_how_long_calls_take(
    caller: Caller, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, ids, _ = layer(20)
    order = cpu.sort(ids, EXPERTS)
    results = torch.zeros((ids.numel(), WIDTH), dtype=torch.bfloat16)
    with served.still:
        caller.begin()
        call = sent_at_last(caller, hidden, order)
        call.late_at = 0.0
        monkeypatch.setattr(caller_module, "LATE_SECONDS", 0.2)
        assert caller.collect([call], results) == [call]
    assert (call.line.estimate.expected(call.count) or 0) >= 0.2
    assert call.line.trust.misses == 1


def test_hosts_that_do_not_check_and_hosts_that_do(served: Served) -> None:
    views = Views()
    views.address = served.address
    trusting = Caller(views, verify=False)  # type: ignore[arg-type]
    trusting.refresh()
    hidden, ids, _ = layer(20)
    order = cpu.sort(ids, EXPERTS)
    results = torch.zeros((ids.numel(), WIDTH), dtype=torch.bfloat16)
    trusting.begin()
    assert trusting.collect([sent_at_last(trusting, hidden, order)], results) == []
    trusting.close()


@pytest.mark.parametrize(
    "parts",
    [[(0, 2), (0, 2)], [(2, 2), (0, 2)], [(0, 0), (0, 4)], [(0, 3), (2, 2)], [(1, 4)], [(-1, 4)]],
    ids=str,
)
def test_parts_that_overlap_or_leave_rows_out_are_no_answer(caller: Caller, parts: list[tuple[int, int]]) -> None:
    hidden, ids, _ = layer(2)
    order = cpu.sort(ids, EXPERTS)
    results = torch.zeros((6, WIDTH), dtype=torch.bfloat16)
    caller.begin()
    call = sent_at_last(caller, hidden, order)
    call.rows, call.count, call.left = [range(4)], 4, 4
    refused = []
    for row, rows in parts:
        frame = zmq.Frame(bytes(max(0, rows) * WIDTH * 2))
        refused.append(caller._place(call, Answer(number=call.number, row=row, rows=rows), [frame], results))
    assert any(refused)


def test_nonsense_on_the_port_hurts_nobody(caller: Caller, served: Served, caplog: pytest.LogCaptureFixture) -> None:
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(served.address)
    for frames in ([b""], [b"\xff" * 50, b"", b""], [b"x"] * 9, [b"\x93"]):
        stranger.send_multipart(frames)
    deadline = time.monotonic() + 10
    while caplog.text.count("speaks to the worker's port") < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert caplog.text.count("speaks to the worker's port") == 4
    hidden, ids, _ = layer(20)
    order = cpu.sort(ids, EXPERTS)
    results = torch.zeros((ids.numel(), WIDTH), dtype=torch.bfloat16)
    caller.begin()
    assert caller.collect([sent_at_last(caller, hidden, order)], results) == []
    stranger.close(linger=0)
    context.term()


def test_who_is_away_is_not_asked_and_who_starts_anew_is(caller: Caller, served: Served) -> None:
    assert caller.able() == {1}
    views = caller._views
    views.address = ""  # type: ignore[attr-defined]
    caller.refresh()
    assert caller.able() == frozenset()
    other = Served()
    try:
        views.address = other.address  # type: ignore[attr-defined]
        caller.refresh()
        hidden, ids, _ = layer(20)
        order = cpu.sort(ids, EXPERTS)
        results = torch.zeros((ids.numel(), WIDTH), dtype=torch.bfloat16)
        caller.begin()
        assert caller.collect([sent_at_last(caller, hidden, order)], results) == []
        assert (served.worker.served.calls, other.worker.served.calls) == (0, 1)
    finally:
        other.stop()
