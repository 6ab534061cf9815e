"""Reads looked after by a thread: how each round ended, and how long the link was busy with it."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest

from asyncep_sgl.experts.sources.arrivals import Arrivals, Wrong
from asyncep_sgl.experts.sources.remote import PeerLostError


class Read:
    """A read that ends when it is told to."""

    def __init__(self, connection: int = 1) -> None:
        self.connection = connection
        self.there = threading.Event()
        self.lost = False
        self.abandoned = False

    def done(self) -> bool:
        if self.lost:
            raise PeerLostError("gone")
        return self.there.is_set()

    def abandon(self) -> None:
        self.abandoned = True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def watch(arrivals: Arrivals, reads: dict[int, Any], wrong: Wrong | None = None) -> Any:
    return arrivals.watch(reads, lambda: wrong or [])


def test_the_link_is_busy_from_the_end_of_the_round_before() -> None:
    clock = Clock()
    arrivals = Arrivals(clock)
    first, second = Read(), Read()
    one, other = watch(arrivals, {1: first}), watch(arrivals, {1: second})
    clock.now = 103.0
    first.there.set()
    assert one.wait(60).seconds == 3.0
    clock.now = 107.0
    second.there.set()
    assert other.wait(60).seconds == 4.0  # not seven: for three the link served the first
    third = Read()
    clock.now = 120.0
    late = watch(arrivals, {1: third})
    clock.now = 121.0
    third.there.set()
    assert late.wait(60).seconds == 1.0  # nor from the end of what ended long ago


def test_what_broke_and_what_came_wrong_is_told() -> None:
    arrivals = Arrivals()
    good, lost = Read(), Read(connection=7)
    good.there.set()
    lost.lost = True
    assert watch(arrivals, {0: good, 2: lost}).wait(60).broken == {2: 7}
    wrong = [("w2_weight", 3, 0)]
    assert watch(arrivals, {0: good}, wrong).wait(60).wrong == wrong


def test_a_round_that_hangs_keeps_no_other_from_ending() -> None:
    arrivals = Arrivals()
    hanging, good = Read(), Read()
    stuck = watch(arrivals, {0: hanging})
    good.there.set()
    assert watch(arrivals, {1: good}).wait(60).broken == {}
    with pytest.raises(TimeoutError):
        stuck.wait(0.01)
    stuck.stop()
    assert hanging.abandoned
    with pytest.raises(CancelledError):
        stuck.wait(60)


def test_an_error_while_checking_reaches_who_waits() -> None:
    arrivals = Arrivals()
    good = Read()
    good.there.set()

    def check() -> Wrong:
        raise KeyError("no digest")

    with pytest.raises(KeyError):
        arrivals.watch({0: good}, check).wait(60)  # type: ignore[dict-item] # as much of a read as is used
