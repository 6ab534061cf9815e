"""The gather pipeline's closed form, against its recurrence and against a simulation event by event."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from asyncep.sim.gather import Pipeline, Run

SECONDS = st.integers(0, 24).map(lambda quarter: quarter / 4)


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, list[tuple[float, list[Run]]]]:
    """A depth, and batches: idle seconds before each, and its layers."""
    runs = st.builds(Run, st.integers(1, 12), SECONDS, SECONDS.filter(bool), SECONDS)
    batches = st.lists(st.tuples(SECONDS, st.lists(runs, min_size=1, max_size=3)), min_size=1, max_size=4)
    return draw(st.integers(1, 4)), draw(batches)


def by_events(depth: int, batches: list[tuple[float, list[Run]]]) -> tuple[list[float], float]:
    """Ends of the batches and seconds stood still, from processes, slots and signals instead of formulas."""
    env = simpy.Environment()
    slots = simpy.Container(env, depth, init=depth)
    layers = [(run, number) for number, (_, runs) in enumerate(batches) for run in runs for _ in range(run.count)]
    arrived = [env.event() for _ in layers]
    ends: list[float] = []
    stood = 0.0

    def channel() -> Generator[simpy.Event, None, None]:
        for (run, _), signal in zip(layers, arrived, strict=True):
            yield slots.get(1)
            yield env.timeout(run.gather)
            signal.succeed()

    def compute() -> Generator[simpy.Event, None, None]:
        nonlocal stood
        position = 0
        for idle, runs in batches:
            yield env.timeout(idle)
            for run in runs:
                for _ in range(run.count):
                    yield env.timeout(run.attention)
                    before = env.now
                    yield arrived[position]
                    stood += env.now - before
                    yield env.timeout(run.experts)
                    yield slots.put(1)
                    position += 1
            ends.append(env.now)

    env.process(channel())
    env.process(compute())
    env.run()
    return ends, stood


@given(streams())
def test_the_closed_form_is_what_happens_event_by_event(stream: tuple[int, list[tuple[float, list[Run]]]]) -> None:
    depth, batches = stream
    pipeline = Pipeline(depth)
    ends, stood, now = [], 0.0, 0.0
    for idle, runs in batches:
        now, stalled = pipeline.run(now + idle, runs)
        ends.append(now)
        stood += stalled
    wanted, wanted_stood = by_events(depth, batches)
    assert ends == pytest.approx(wanted)
    assert stood == pytest.approx(wanted_stood)


@given(
    depth=st.integers(2, 4),
    released=st.lists(SECONDS, min_size=4, max_size=4),
    gathered=SECONDS,
    idle=SECONDS,
    run=st.builds(Run, st.integers(5, 200), SECONDS, SECONDS, SECONDS),
)
def test_the_closed_form_is_the_recurrence_from_any_state(
    depth: int, released: list[float], gathered: float, idle: float, run: Run
) -> None:
    start = sorted(released)[:depth]
    closed, stepped = Pipeline(depth, gathered, deque(start)), Pipeline(depth, gathered, deque(start))
    now = start[-1] + idle
    assert closed._equal(now, run) == pytest.approx(stepped._each(now, run))
    assert closed.gathered == pytest.approx(stepped.gathered)
    assert list(closed.released) == pytest.approx(list(stepped.released))


@given(st.integers(2, 4), SECONDS, SECONDS.filter(bool), SECONDS, st.integers(20, 60))
def test_in_steady_state_what_is_exposed_is_what_exceeds_the_window(
    depth: int, attention: float, experts: float, gather: float, layers: int
) -> None:
    run = Run(layers, attention, experts, gather)
    pipeline = Pipeline(depth)
    end, _ = pipeline.run(0.0, [run])
    for _ in range(30):  # a lead or lag of the first batches wears off
        end, stalled = pipeline.run(end, [run])
    assert stalled == pytest.approx(layers * max(0.0, gather - attention - experts), abs=1e-6)


def test_by_hand_gather_hidden() -> None:
    # Two layers of 1 + 2 s, gathers of 2 s: the first is waited for (1 s), the second is there.
    assert Pipeline(2).run(0.0, [Run(2, 1.0, 2.0, 2.0)]) == (7.0, 1.0)


def test_by_hand_gather_exposed() -> None:
    # Gathers of 5 s: experts begin at 5, 10, 15 and take 2.
    assert Pipeline(2).run(0.0, [Run(3, 1.0, 2.0, 5.0)]) == (17.0, 8.0)


def test_by_hand_one_slot_hides_behind_attention_only() -> None:
    # The gather begins when the previous experts are done: 4, then max(1, 4) + 2 each.
    assert Pipeline(1).run(0.0, [Run(3, 1.0, 2.0, 4.0)]) == (18.0, 9.0)


def test_batches_follow_without_a_bubble() -> None:
    pipeline = Pipeline(2)
    run = Run(10, 1.0, 2.0, 2.5)
    end, _ = pipeline.run(0.0, [run])
    again, stalled = pipeline.run(end, [run])
    assert stalled == 0.0
    assert again == pytest.approx(end + 30.0)


def test_layers_without_experts_lengthen_the_window() -> None:
    assert Pipeline(2).run(0.0, [Run(1, 3.0, 1.0, 3.0), Run(1, 2.0, 0.0, 0.0)]) == (6.0, 0.0)
