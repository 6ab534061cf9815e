"""Rates of callers: nobody gets more than theirs, and who comes when told to is served."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncep_router.keys import Caller
from asyncep_router.rates import Rates

STEPS = st.lists(st.tuples(st.floats(0, 20), st.integers(1, 500)), max_size=40)


@given(st.floats(0.1, 1000), STEPS)
def test_nobody_gets_more_than_their_rate(rate: float, steps: list[tuple[float, int]]) -> None:
    now, taken, largest = 0.0, 0, 0
    rates = Rates(lambda: now)
    caller = Caller("ann", prompts_per_second=rate)
    for pause, prompts in steps:
        now += pause
        if (wait := rates.take(caller, prompts)) > 0:
            # Told to come again then, it is served then.
            now += wait
            assert rates.take(caller, prompts) == 0
        taken, largest = taken + prompts, max(largest, prompts)
        # What a full bucket holds, what has passed, and one request that may be larger than the bucket.
        assert taken <= max(1.0, 10 * rate) + rate * now + largest + 1e-6
        assert rates.take(Caller("bob"), 10**9) == 0


@given(st.floats(0.1, 1000), STEPS)
def test_a_debt_is_paid_with_time(rate: float, steps: list[tuple[float, int]]) -> None:
    now, charged = 0.0, 0
    rates = Rates(lambda: now)
    caller = Caller("ann", prompts_per_second=rate)
    assert rates.debt_seconds(caller) == 0
    for pause, prompts in steps:
        now += pause
        rates.charge(caller, prompts)
        charged += prompts
        debt = rates.debt_seconds(caller)
        # No more than what was charged beyond a full bucket, and no less than what was charged beyond all that came.
        assert charged - max(1.0, 10 * rate) - rate * now - 1e-6 <= debt * rate <= charged
        if debt > 0:
            now += debt
            assert rates.debt_seconds(caller) * rate <= 1e-6
    assert rates.debt_seconds(Caller("bob")) == 0
