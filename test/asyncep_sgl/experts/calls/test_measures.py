"""What a rank and a worker measure: the price of work, of copying, and how busy a host is."""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from asyncep_kernels.moe.table import ExpertTable
from asyncep_sgl.experts.calls.busy import Busy
from asyncep_sgl.experts.calls.measure import seconds_of_work, share_of_copying
from asyncep_sgl.experts.gather.pipeline import Gathered

EXPERTS, WIDTH, INTER = 6, 64, 32


def table() -> ExpertTable:
    generator = torch.Generator().manual_seed(5)
    w13 = torch.randn(EXPERTS, 2 * INTER, WIDTH, generator=generator) / 8
    w2 = torch.randn(EXPERTS, WIDTH, INTER, generator=generator) / 6
    return ExpertTable(w13.bfloat16(), w2.bfloat16())


class Fetch:
    """Over after it has been looked at so often."""

    def __init__(self, looks: int, *, exact: bool = True) -> None:
        self._looks, self._exact = looks, exact

    def over(self) -> bool:
        self._looks -= 1
        return self._looks < 0

    def wait(self) -> Gathered:
        return Gathered(0.1, self._exact)

    def cancel(self) -> None:
        """Nothing is under way."""


def test_work_costs_something_and_no_expert_without_contents_is_read() -> None:
    w13, w2 = table().entries()
    own = (1, 4)
    nothing = torch.full_like(w13[0], float("nan")), torch.full_like(w2[0], float("nan"))
    held = [(w13[e], w2[e]) if e in own else nothing for e in range(EXPERTS)]
    expert, row = seconds_of_work(ExpertTable([one for one, _ in held], [two for _, two in held]), own)
    assert expert >= 0
    assert row >= 0
    assert expert + row > 0


def test_a_disturbed_fetch_is_measured_again_and_one_that_is_over_at_once_says_nothing() -> None:
    started: list[Fetch] = []

    def start(*made: Fetch) -> Any:
        left = list(made)

        def begin() -> Fetch:
            started.append(left.pop(0))
            return started[-1]

        return begin

    assert 0 <= share_of_copying(table(), (0, 2), start(Fetch(5, exact=False), Fetch(5))) <= 1
    assert len(started) == 2
    assert share_of_copying(table(), (0, 2), start(*(Fetch(5, exact=False) for _ in range(3)))) == 0
    assert share_of_copying(table(), (0, 2), start(*(Fetch(0) for _ in range(3)))) == 0


class Core(NamedTuple):
    user: float
    system: float
    idle: float
    iowait: float


def test_busy_is_what_others_use_of_the_hosts_own_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    now, cores, own = 100.0, [Core(0, 0, 0, 0)] * 3, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: cores)
    monkeypatch.setattr(os, "times", lambda: os.times_result((own, 0.0, 0.0, 0.0, 0.0)))
    busy = Busy({0, 1})
    assert busy.share() == 0
    # A second: of two cores' two seconds others used 0.5 + 0.4, this process 0.3; the third core is no matter.
    now, own = 101.0, 0.3
    cores = [Core(0.5, 0.2, 0.2, 0.1), Core(0.3, 0.2, 0.5, 0.0), Core(1.0, 0.0, 0.0, 0.0)]
    assert busy.share() == pytest.approx(0.45)
    now, own = 101.05, 0.0
    assert busy.share() == pytest.approx(0.45)  # too soon to look again
    now, own = 102.0, 9.0
    assert busy.share() == 0  # clocks that do not fit together
    assert Busy({0, 7}).share() == 0  # a container that sees fewer cores
