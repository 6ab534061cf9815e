"""When a rank counts as stuck: its own silence only, in time that the router was awake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from hypothesis import given
from hypothesis import strategies as st

from asyncep_sgl.process.state import process_state, stuck
from asyncep_sgl.router.vigil import Vigil


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), min_size=1, max_size=60))
def test_a_rank_that_beats_whenever_the_router_looks_is_never_silent(turns: list[tuple[float, bool]]) -> None:
    vigil, now = Vigil(), 0.0
    vigil.started(0)
    vigil.started(1)
    quiet = 0.0
    for pause, beats in turns:
        now += pause
        vigil.look(now)
        vigil.beat(0)
        if beats:
            vigil.beat(1)
        quiet = 0.0 if beats else quiet + min(pause, vigil.step)
        assert vigil.silent_for(0) == 0.0
        # However long a turn took, it counts for no more than a look: the first starts the clock.
        assert vigil.silent_for(1) <= quiet + 1e-6


def test_a_router_that_slept_for_an_hour_finds_nobody_silent() -> None:
    vigil = Vigil()
    vigil.look(0.0)
    vigil.started(0)
    vigil.beat(0)
    vigil.look(3600.0)
    assert vigil.silent_for(0) <= vigil.step < vigil.limit(0)
    assert not vigil.stalled(0, 0.0)


def test_a_silent_rank_is_found_after_ten_seconds_and_a_starting_one_after_five_minutes() -> None:
    vigil = Vigil()
    for second in range(400):
        vigil.look(float(second))
        if second == 0:
            vigil.started(0)
            vigil.started(1)
            vigil.beat(0)
        assert (vigil.silent_for(0) >= vigil.limit(0)) == (second >= 10)
        assert (vigil.silent_for(1) >= vigil.limit(1)) == (second >= 300)


def test_long_honest_work_is_no_stall() -> None:
    vigil = Vigil()
    vigil.look(0.0)
    vigil.started(0)
    for second in range(1, 700):
        vigil.look(float(second))
        # A batch that should take 30 s may take ten minutes; one that should take none a minute.
        assert vigil.stalled(0, 0.1) == (second > 60)
        assert vigil.stalled(0, 30.0) == (second > 600)
        assert vigil.stalled(0, None) == (second > 600)
    vigil.moved(0)
    assert not vigil.stalled(0, 0.1)


def child(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)


def test_the_kernel_tells_stopped_from_busy_from_asleep() -> None:
    busy = child("print(flush=True)\nwhile True: pass")
    asleep = child("import time\nprint(flush=True)\ntime.sleep(600)")
    with busy, asleep:
        try:
            for process in (busy, asleep):
                assert process.stdout is not None
                process.stdout.readline()
            while (state := process_state(asleep.pid)) is None or state.waits_for_cpu:
                time.sleep(0.01)
            first = {process.pid: process_state(process.pid) for process in (busy, asleep)}
            while (now := process_state(busy.pid)) is None or now.ticks == first[busy.pid].ticks:  # type: ignore[union-attr]
                time.sleep(0.01)

            def verdict(process: subprocess.Popen[bytes]) -> bool:
                before, after = first[process.pid], process_state(process.pid)
                assert before is not None
                assert after is not None
                return stuck(before, after)

            assert not verdict(busy)
            assert verdict(asleep)
            os.kill(busy.pid, signal.SIGSTOP)
            while (now := process_state(busy.pid)) is None or not now.stopped:
                time.sleep(0.01)
            assert verdict(busy)
        finally:
            busy.kill()
            asleep.kill()
    assert process_state(busy.pid) is None
