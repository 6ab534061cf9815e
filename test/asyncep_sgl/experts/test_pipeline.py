"""The pipeline's promises, for any interleaving of batches, aborts and failures, on a clock and transfers of our own.

The transfers here are what a link is to the pipeline: each takes its time, writes into its slot all that while, and may
fail. Every write and read is checked against every other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep_sgl.errors import GatherError
from asyncep_sgl.experts.gather.pipeline import Gathered, GatherPipeline


@dataclass
class Link:
    """Moves layers into slots, ``seconds`` each, one after the other; fails where told to.

    Attributes:
        holds: what each slot holds, None while it is being written or after a failure.
        writing: slots with a transfer under way.
        reading: slots that compute reads now.
    """

    seconds: list[float]
    failures: set[int] = field(default_factory=set)
    now: float = 0.0
    free_at: float = 0.0
    started: list[tuple[int, int]] = field(default_factory=list)
    holds: dict[int, int | None] = field(default_factory=dict)
    writing: dict[int, int] = field(default_factory=dict)
    reading: set[int] = field(default_factory=set)

    def start(self, layer: int, slot: int) -> Transfer:
        assert slot not in self.writing, "two transfers into one slot"
        assert slot not in self.reading, "a slot overwritten while compute reads it"
        number = len(self.started)
        self.started.append((layer, slot))
        self.holds[slot] = None
        self.writing[slot] = number
        self.free_at = max(self.now, self.free_at) + self.seconds[number % len(self.seconds)]
        return Transfer(self, number, layer, slot, self.free_at)


@dataclass
class Transfer:
    link: Link
    number: int
    layer: int
    slot: int
    done_at: float

    def wait(self) -> Gathered:
        self.link.now = max(self.link.now, self.done_at)
        self._end()
        if self.number in self.link.failures:
            raise GatherError("the link said no")
        self.link.holds[self.slot] = self.layer
        return Gathered(1.0, True)

    def over(self) -> bool:
        return self.link.now >= self.done_at

    def cancel(self) -> None:
        self.link.now = max(self.link.now, self.done_at)
        self._end()

    def _end(self) -> None:
        if self.link.writing.get(self.slot) == self.number:
            del self.link.writing[self.slot]


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, list[float], set[int], list[tuple[int, bool]]]:
    """(layers, depth, seconds of each transfer, those that fail, batches as (layers computed, left in use))."""
    layers = draw(st.integers(1, 7))
    depth = draw(st.integers(1, 4))
    seconds = draw(st.lists(st.floats(0, 5), min_size=1, max_size=6))
    failures = draw(st.sets(st.integers(0, 30), max_size=6))
    batches = draw(st.lists(st.tuples(st.integers(0, layers), st.booleans()), min_size=1, max_size=8))
    return layers, depth, seconds, failures, batches


@settings(max_examples=400)
@given(history=histories(), compute=st.floats(0, 5))
def test_never_read_before_written_never_overwritten_before_consumed(
    history: tuple[int, int, list[float], set[int], list[tuple[int, bool]]], compute: float
) -> None:
    count, depth, seconds, failures, batches = history
    link = Link(seconds, failures)
    names = [10 + 3 * layer for layer in range(count)]  # layers without experts lie between
    pipeline = GatherPipeline(names, depth, link.start, lambda: link.now)
    for computed, left_in_use in batches:
        pipeline.begin()
        for position in range(computed):
            layer = names[position]
            while True:
                try:
                    slot = pipeline.wait(layer)
                    break
                except GatherError:
                    continue
            assert link.holds[slot] == layer
            assert slot not in link.writing
            link.reading.add(slot)
            link.now += compute
            assert link.holds[slot] == layer, "changed under the computation"
            link.reading.discard(slot)
            if left_in_use and position == computed - 1:
                break
            pipeline.release(layer)
    pipeline.close()
    assert not link.writing


@given(layers=st.integers(1, 9), depth=st.integers(1, 4), batches=st.integers(1, 5))
def test_every_layer_is_fetched_once_a_batch_and_an_idle_rank_fetches_nothing(
    layers: int, depth: int, batches: int
) -> None:
    link = Link([1.0])
    pipeline = GatherPipeline(range(layers), depth, link.start, lambda: link.now)
    for _ in range(batches):
        pipeline.begin()
        for layer in range(layers):
            pipeline.wait(layer)
            pipeline.release(layer)
    assert [layer for layer, _ in link.started] == [step % layers for step in range(batches * layers + depth)]
    before = len(link.started)
    for _ in range(5):
        pipeline.begin()  # upstream calls it for idle passes as well
    assert len(link.started) == before


@given(layers=st.integers(2, 8), depth=st.integers(2, 4), gather=st.floats(0.1, 4), compute=st.floats(0.1, 4))
def test_exposed_wait_is_what_the_window_does_not_cover(layers: int, depth: int, gather: float, compute: float) -> None:
    """In the steady state a layer waits ``max(0, gather - compute)``, batch boundaries included."""
    link = Link([gather])
    pipeline = GatherPipeline(range(layers), depth, link.start, lambda: link.now)
    for batch in range(5):
        pipeline.begin()
        for layer in range(layers):
            pipeline.wait(layer)
            link.now += compute
            pipeline.release(layer)
        if batch == 4:
            trace = pipeline.trace()
            assert [entry.layer for entry in trace] == list(range(layers))
            for entry in trace[1:]:
                assert entry.exposed == pytest.approx(max(0.0, gather - compute), abs=1e-6)
            assert trace[0].exposed == pytest.approx(max(0.0, gather - compute), abs=1e-6)
            assert all(entry.window == pytest.approx(compute, abs=1e-6) for entry in trace[:-1])
            assert trace[-1].window is None


@settings(max_examples=400)
@given(
    history=histories(),
    compute=st.floats(0, 5),
    patience=st.lists(st.sampled_from(["wait", "patient", "impatient", "ignore"]), min_size=1, max_size=9),
)
def test_who_takes_what_is_there_never_reads_what_is_being_written(
    history: tuple[int, int, list[float], set[int], list[tuple[int, bool]]], compute: float, patience: list[str]
) -> None:
    """Whether it waits for what comes or leaves it, in any order; what it leaves is not in the way of what follows."""
    count, depth, seconds, _, batches = history
    link = Link(seconds)
    pipeline = GatherPipeline(range(count), depth, link.start, lambda: link.now)
    turn = 0
    for computed, left_in_use in batches:
        pipeline.begin()
        for layer in range(computed):
            how, turn = patience[turn % len(patience)], turn + 1
            if how == "wait":
                slot = pipeline.wait(layer)
                assert link.holds[slot] == layer
            else:
                before = link.now
                slot, fetch = pipeline.take(layer, patient=how == "patient")
                if how == "patient":
                    assert fetch is not None
                else:
                    assert link.now == before, "an impatient one waited"
                if fetch is not None:
                    assert isinstance(fetch, Transfer)
                    assert (fetch.layer, fetch.slot) == (layer, slot)
                    if how != "ignore":
                        pipeline.waited(link.now - before, fetch.wait())
                        assert link.holds[slot] == layer
            link.reading.add(slot)
            link.now += compute
            link.reading.discard(slot)
            if left_in_use and layer == computed - 1:
                break
            pipeline.release(layer)
    pipeline.close()
    assert not link.writing


def test_depth_one_hides_nothing() -> None:
    link = Link([2.0])
    pipeline = GatherPipeline(range(3), 1, link.start, lambda: link.now)
    pipeline.begin()
    for layer in range(3):
        pipeline.wait(layer)
        link.now += 5
        pipeline.release(layer)
    assert [entry.exposed for entry in pipeline.trace()] == [2.0, 2.0, 2.0]


def test_calls_out_of_order_are_refused() -> None:
    link = Link([1.0])
    pipeline = GatherPipeline([4, 5], 2, link.start, lambda: link.now)
    pipeline.begin()
    with pytest.raises(ValueError, match="layer 5 is not next; 4 is"):
        pipeline.wait(5)
    with pytest.raises(ValueError, match="without a wait"):
        pipeline.release(4)
    pipeline.wait(4)
    with pytest.raises(ValueError, match="computing already"):
        pipeline.wait(4)
