"""T follows what is measured: the window of the batches, and a link that changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep_sgl.experts.gather.log import GatherBook
from asyncep_sgl.experts.gather.pipeline import Gathered, LayerTrace
from asyncep_sgl.experts.gather.window import WindowModel

LAYERS = 8
PER_FLOP, FIXED = 5e-12, 2e-3  # a core of 200 GFLOP/s


def book(seconds: float) -> GatherBook:
    return GatherBook(0, LAYERS, LAYERS - 1, 1 << 20, seconds, peak=4e11, margin=1.2, log=False)


def serve(kept: GatherBook, seconds: float, batches: int, *, exact: bool = True) -> None:
    """Batches of growing FLOPs over a link that takes ``seconds`` a layer."""
    for number in range(batches):
        flops = 1e9 * (5 + number % 7)
        window = FIXED + PER_FLOP * flops
        gathered = Gathered(seconds, exact)
        trace = [LayerTrace(layer, max(0.0, seconds - window), window, gathered) for layer in range(1, LAYERS)]
        kept.batch(trace, flops * LAYERS, window * LAYERS, flops * LAYERS)


@given(
    fixed=st.floats(0, 1e-2), per_flop=st.floats(1e-13, 1e-10), seconds=st.floats(1e-3, 1), least=st.floats(1e8, 1e10)
)
def test_a_line_is_found_again(fixed: float, per_flop: float, seconds: float, least: float) -> None:
    model = WindowModel()
    for step in range(1, 6):
        model.add(least * step, fixed + per_flop * least * step)
    expected = max(0.0, seconds - fixed) / per_flop
    found = model.saturation(seconds)
    assert found is not None
    # Where the line's fixed part is lost in rounding, it is taken through the origin: off by at most that.
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-2 * seconds / per_flop + fixed / per_flop * 1e-2)


def test_t_follows_a_link_that_slows_down_and_recovers() -> None:
    kept = book(seconds=0.02)
    assert kept.threshold() == pytest.approx(0.02 * 4e11 * 1.2)  # the paper's, before any batch
    expected = {seconds: (seconds * 1.2 - FIXED) / PER_FLOP for seconds in (0.02, 0.06)}
    serve(kept, 0.02, 20)
    assert kept.threshold() == pytest.approx(expected[0.02], rel=0.01)
    serve(kept, 0.06, 20)
    assert kept.threshold() == pytest.approx(expected[0.06], rel=0.01)
    serve(kept, 0.02, 20)
    assert kept.threshold() == pytest.approx(expected[0.02], rel=0.01)
    report = kept.report(0, 0)
    assert report.peak_threshold_flops == pytest.approx(0.02 * 4e11 * 1.2, rel=0.01)


def test_a_bound_only_lowers_t() -> None:
    kept = book(seconds=0.02)
    serve(kept, 0.05, 20, exact=False)
    assert kept.seconds == 0.02
    serve(kept, 0.01, 40, exact=False)
    assert kept.seconds == pytest.approx(0.01, rel=0.01)


def after_gathers(*seconds: float) -> float:
    """t_EP, 20 ms before, after a batch whose gathers took ``seconds``."""
    kept = book(seconds=0.02)
    traces = [LayerTrace(layer, 0.0, 0.05, Gathered(each, True)) for layer, each in enumerate(seconds)]
    kept.batch(traces, 1e10, 0.05 * LAYERS, 1e10)
    return kept.seconds


def test_gathers_that_share_the_link_count_together() -> None:
    assert after_gathers(0.04, 0.0, 0.04, 0.0) == pytest.approx(0.02)


@given(trouble=st.floats(0, 1e3))
def test_a_moments_trouble_moves_t_by_a_quarter_at_most(trouble: float) -> None:
    assert 0.0175 - 1e-9 <= after_gathers(0.02, trouble) <= 0.025 + 1e-9


def test_batches_near_what_hides_a_gather_decide_where_the_curve_bends() -> None:
    """Receiving takes a part of the core: of all of a window that is shorter than the gather, of a part of others."""
    kept = book(seconds=0.1)
    bend = 20e9  # FLOPs whose window is the gather's time
    for number in range(40):
        flops = bend * (0.2, 0.9, 1.1, 3.0)[number % 4]
        window = 0.1 * flops / bend if flops < bend else 0.1 + 0.07 * (flops - bend) / bend
        traces = [LayerTrace(layer, 0.0, window, Gathered(0.1, True)) for layer in range(1, LAYERS)]
        kept.batch(traces, flops * LAYERS, window * LAYERS, flops * LAYERS)
    # Unweighted it would be 11 % too high.
    assert kept.report(0, 0).saturation_flops == pytest.approx(bend, rel=0.05)


def test_batches_far_from_t_do_not_move_it() -> None:
    """A short prompt reads weights and computes little: a line through such batches says nothing of T."""
    kept = book(seconds=0.2)
    for _ in range(500):
        trace = [LayerTrace(layer, 0.0, FIXED, None) for layer in range(1, LAYERS)]
        kept.batch(trace, 1e6 * LAYERS, FIXED * LAYERS, 1e9)
    assert not kept.window.known
    assert kept.threshold() == pytest.approx(0.2 * 4e11 * 1.2)
    kept.batch([LayerTrace(1, 0.0, 0.15, None)], 3e10 * LAYERS, 1.2, 1e9)
    assert kept.window.known
