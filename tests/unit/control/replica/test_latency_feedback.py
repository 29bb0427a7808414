"""The latency feedback: what counts is the worst of the recent short intervals, held against what was predicted."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.control.replica.latency_feedback import Peak, TailState, update_tail, with_reachable

WINDOWS = {"window_s": 5.0, "hold_s": 60.0, "lag_s": 3.0}


@given(st.lists(st.one_of(st.none(), st.floats(-5, 5)), min_size=1, max_size=80))
def test_a_peak_is_the_highest_of_one_to_two_holds(values):
    peak = Peak()
    for value in values:
        peak = peak.after(value, 1.0, 10.0)
    least = [v for v in values[-10:] if v is not None]
    most = [v for v in values[-20:] if v is not None]
    if least:
        assert max(least) <= peak.value <= max(most)
    if not most:
        assert peak.value is None


@given(
    st.lists(
        st.tuples(st.one_of(st.none(), st.floats(1e-3, 1e3)), st.one_of(st.none(), st.floats(1e-3, 1e3))), max_size=60
    )
)
def test_the_factor_stays_within_its_clamp(seen):
    state = TailState()
    for measured_s, predicted_s in seen:
        state = update_tail(state, measured_s, predicted_s, 0.5, **WINDOWS)
        assert 0.25 - 1e-9 <= state.factor <= 4.0 + 1e-9


def run(state, measured_s, predicted_s, seconds):
    for _ in range(2 * seconds):
        state = update_tail(state, measured_s, predicted_s, 0.5, **WINDOWS)
    return state


def test_a_bad_interval_counts_for_a_minute_or_two_and_is_then_forgotten():
    state = run(TailState(), 0.1, 0.1, 10)
    state = run(state, 0.15, 0.1, 5)
    assert run(state, 0.1, 0.1, 50).factor == pytest.approx(1.5, rel=0.01)
    assert run(state, 0.1, 0.1, 140).factor == pytest.approx(1.0, rel=0.01)


def test_a_raise_of_the_cap_is_not_blamed_for_what_was_slow_before_it():
    state = run(TailState(), 0.2, 0.2, 30)
    after = run(state, 0.2, 0.05, 4)  # the window still holds slow tokens, the prediction is for the new cap
    assert math.isclose(after.factor, 1.0, rel_tol=0.01)


def test_one_excess_that_no_cap_would_have_kept_is_passed_over_a_second_is_not():
    calm = with_reachable(run(TailState(), 0.1, 0.1, 10), 0.12, 0.1)
    once = run(run(calm, 0.2, 0.1, 5), 0.1, 0.1, 10)
    assert once.factor == pytest.approx(1.0, rel=0.01)
    again = run(run(once, 0.2, 0.1, 5), 0.1, 0.1, 5)
    assert again.factor == pytest.approx(2.0, rel=0.1)
    # After a hold without one the next is chance again.
    later = run(run(run(once, 0.1, 0.1, 60), 0.2, 0.1, 5), 0.1, 0.1, 10)
    assert later.factor == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("window_s", [5.0, 20.0, 60.0])
def test_an_excess_that_lasts_counts_though_no_cap_would_have_kept_it(window_s):
    windows = WINDOWS | {"window_s": window_s}
    state = with_reachable(run(TailState(), 0.1, 0.1, 10), 0.12, 0.1)
    for _ in range(round(2 * (1.5 * window_s + 15))):
        state = update_tail(state, 0.2, 0.1, 0.5, **windows)
    assert state.factor == pytest.approx(2.0, rel=0.1)
    assert run(state, 0.2, 0.1, 10).factor == pytest.approx(2.0, rel=0.1)


def test_an_excess_that_a_higher_cap_keeps_counts_at_once():
    state = with_reachable(run(TailState(), 0.1, 0.1, 10), 0.25, 0.1)
    assert run(state, 0.2, 0.1, 5).factor > 1.5


@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.floats(-1.0, 1.0))
def test_what_is_within_reach_does_not_depend_on_the_factor_in_use(limit_s, raw_s, log):
    state = with_reachable(TailState(log_factor=log), limit_s, raw_s * math.exp(log))
    assert state.reachable == pytest.approx(math.log(limit_s / raw_s), abs=1e-9)
    assert with_reachable(state, None, raw_s).reachable is None
