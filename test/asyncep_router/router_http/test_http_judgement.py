"""Whose fault a failure is: the rule, and what no sequence of one client's requests can do."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep_router.http.breaker import Breaker, BreakerSettings, BreakerState
from asyncep_router.http.judgement import Finding, Outcome, Trial, outcome_of

FAILURES = (Outcome.UNAVAILABLE, Outcome.FAILED, Outcome.DROPPED, Outcome.TIMED_OUT)
STRIKES = (Outcome.FAILED, Outcome.DROPPED, Outcome.TIMED_OUT)


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (200, b"", Outcome.ANSWERED),
        (302, b"", Outcome.REFUSED),
        (400, b"", Outcome.REFUSED),
        (401, b"", Outcome.REFUSED),
        (408, b"", Outcome.BUSY),
        (429, b"", Outcome.BUSY),
        (500, b"", Outcome.FAILED),
        (500, b"the request is quarantined", Outcome.QUARANTINED),
        (503, b"the request is quarantined", Outcome.UNAVAILABLE),
        (501, b"", Outcome.FAILED),
        (502, b"", Outcome.UNAVAILABLE),
        (503, b"", Outcome.UNAVAILABLE),
        (504, b"", Outcome.UNAVAILABLE),
        (599, b"", Outcome.FAILED),
    ],
)
def test_answers_are_read(status: int, body: bytes, outcome: Outcome) -> None:
    assert outcome_of(status, body) is outcome


def test_a_worker_that_fails_where_another_answers_is_to_blame() -> None:
    for outcome in FAILURES:
        trial = Trial()
        assert trial.record("a", outcome).again
        assert trial.record("b", Outcome.ANSWERED) == Finding(succeeded="b", blamed=("a",))


def test_what_fails_alike_elsewhere_is_tried_twice_and_booked_on_nobody() -> None:
    for outcome in STRIKES:
        trial = Trial()
        assert trial.record("a", outcome) == Finding(again=True, questioned=("a",))
        assert trial.record("b", outcome) == Finding(questioned=("a", "b"))


def test_a_client_error_elsewhere_clears_the_worker_that_called_it_its_own() -> None:
    trial = Trial()
    trial.record("a", Outcome.FAILED)
    assert trial.record("b", Outcome.REFUSED) == Finding()


def test_quarantine_is_final() -> None:
    assert Trial().record("a", Outcome.QUARANTINED) == Finding()


def test_what_a_worker_never_computed_is_no_strike() -> None:
    trial = Trial()
    for outcome in (Outcome.BUSY, Outcome.GIVEN_UP, Outcome.UNCONNECTED, Outcome.UNAVAILABLE) * 2:
        assert trial.record("a", outcome).again
    assert trial.record("a", Outcome.DROPPED).again
    assert trial.record("b", Outcome.UNCONNECTED) == Finding(again=True, blamed=("b",))
    assert not trial.record("b", Outcome.DROPPED).again


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(Outcome)), max_size=12))
def test_a_trial_keeps_its_laws(attempts: list[tuple[str, Outcome]]) -> None:
    trial = Trial()
    strikes = 0
    for worker, outcome in attempts:
        finding = trial.record(worker, outcome)
        strikes += outcome in STRIKES
        # At most two workers begin with a request that breaks them.
        assert not (finding.again and strikes > 1)
        assert (finding.succeeded is not None) == (outcome is Outcome.ANSWERED)
        if outcome is Outcome.ANSWERED:
            assert worker not in finding.blamed
        elif outcome is Outcome.UNCONNECTED:
            assert finding.blamed == (worker,)
        else:
            assert not finding.blamed
        if not finding.again:
            return


# A fleet whose breakers are fed by the rule, as `fleet.py` and `relay.py` do.


@dataclass
class Fleet:
    """`broken`: workers that fail whatever they get."""

    size: int
    broken: set[int]
    retries: int = 5
    clock: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        rule = BreakerSettings(failures=3, successes=1, timeout=10_000, window=10_000)
        self.breakers = [Breaker(rule) for _ in range(self.size)]
        self.computed: list[int] = []

    def send(self, outcome: Outcome | None, start: int) -> Outcome | None:
        """A request that gets this outcome from every worker that works, None for a good one; what the client gets,
        None if nobody was there."""
        trial = Trial()
        self.computed = []
        last: Outcome | None = None
        for attempt in range(1 + self.retries):
            fitting = [worker for worker in range(self.size) if self.breakers[worker].state is not BreakerState.OPEN]
            if not fitting:
                return last
            fresh = [worker for worker in fitting if str(worker) not in trial.failed]
            worker = (fresh or fitting)[(start + attempt) % len(fresh or fitting)]
            self.computed.append(worker)
            last = Outcome.FAILED if worker in self.broken else outcome or Outcome.ANSWERED
            finding = trial.record(str(worker), last)
            if finding.succeeded is not None:
                self.breakers[worker].record(True, next(self.clock))
            for ident in finding.blamed:
                self.breakers[int(ident)].record(False, next(self.clock))
            for ident in finding.questioned:
                # The router's own question: a working worker answers it, a broken one does not.
                if int(ident) in self.broken:
                    self.breakers[int(ident)].record(False, next(self.clock))
            if not finding.again:
                break
        return last


POISONS = st.sampled_from([*FAILURES, Outcome.QUARANTINED, Outcome.BUSY, Outcome.REFUSED])


@settings(max_examples=120)
@given(st.integers(1, 4), st.lists(st.tuples(POISONS, st.integers(0, 3)), max_size=80))
def test_no_sequence_of_poison_opens_a_circuit(size: int, poison: list[tuple[Outcome, int]]) -> None:
    fleet = Fleet(size, set())
    for outcome, start in poison:
        fleet.send(outcome, start)
        if outcome in STRIKES:
            assert len(fleet.computed) == 2
            assert len(set(fleet.computed)) == min(2, size)
    assert all(breaker.state is BreakerState.CLOSED for breaker in fleet.breakers)
    assert all(fleet.send(None, start) is Outcome.ANSWERED for start in range(4))


@settings(max_examples=120)
@given(
    st.integers(1, 4).flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.sets(st.integers(0, size - 1), min_size=1),
            st.lists(st.tuples(st.one_of(st.none(), POISONS), st.integers(0, 3)), min_size=60, max_size=90),
        )
    )
)
def test_broken_workers_are_found_among_poison_and_no_others(
    case: tuple[int, set[int], list[tuple[Outcome | None, int]]],
) -> None:
    size, broken, requests = case
    fleet = Fleet(size, broken)
    for outcome, start in requests:
        found = fleet.send(outcome, start)
        if outcome is None and len(broken) < size:
            assert found is Outcome.ANSWERED or len(broken) > 1  # two broken ones in a row may end it
    for worker, breaker in enumerate(fleet.breakers):
        if worker not in broken:
            assert breaker.state is BreakerState.CLOSED
    # Good requests find every broken worker that still gets any.
    for start in range(40):
        fleet.send(None, start)
    assert len(broken) == size or fleet.send(None, 0) is Outcome.ANSWERED
    open_ones = {worker for worker, breaker in enumerate(fleet.breakers) if breaker.state is BreakerState.OPEN}
    assert open_ones == broken
