"""Following a signal: mean draw at the target, the budget under its ceiling, no winding up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.control.budget.regulation import sample_means, score, synthetic_signal
from pals_ray.control.budget.signal_following import FleetWatts, Following, FollowState, step

FOLLOWING = Following(base_w=1000, range_w=150, ceiling_w=1250)


@dataclass(frozen=True)
class Fleet:
    """Charged what it is granted, between its lowest caps and what it wants; draws a share of its charge."""

    drawn_share: float = 0.975
    wants_w: float = 5000.0
    needed_w: float = 400.0

    def charge_w(self, budget_w):
        return min(max(budget_w, self.needed_w), self.wants_w)


def follow(ys, fleet, following=FOLLOWING, feedback=True):
    """Step once a second; targets, budgets and mean draws after each step, W."""
    state, rows, measured_w = FollowState(), [], None
    charge_w = fleet.charge_w(following.base_w)
    for second, y in enumerate(ys):
        state = done = step(
            state,
            following,
            y,
            float(second),
            FleetWatts(fleet.needed_w, charge_w, measured_w if feedback else None),
        )
        before_w, charge_w = charge_w, fleet.charge_w(done.budget_w)
        measured_w = fleet.drawn_share * (0.3 * before_w + 0.7 * charge_w)  # a raise takes 0.3 s to arrive
        rows.append((done.target_w, done.budget_w, measured_w))
    return np.array(rows).T


def test_the_draw_comes_to_the_target_although_the_fleet_sits_under_its_caps():
    target_w, budget_w, draw_w = follow([0.0] * 60, Fleet())
    assert budget_w[0] == 1000
    assert draw_w[-1] == pytest.approx(1000, abs=0.5)
    assert target_w[-1] == 1000


def test_feedback_takes_the_mean_error_along_a_signal_from_two_per_cent_and_more_to_under_one():
    signal = synthetic_signal(1200, seed=1)
    ys = [signal.at(second) for second in range(1200)]
    errors = []
    for feedback in (False, True):
        target_w, _, draw_w = follow(ys, Fleet(), feedback=feedback)
        errors.append(np.mean(np.abs(draw_w - target_w)) / np.mean(target_w))
    assert errors[0] > 0.02
    assert errors[1] < 0.01


def test_an_hour_followed_meets_the_scores_asked_for_in_the_mean_of_seeds_and_smoothing_is_why():
    """Against the signal itself: relative tracking error 3 %, AQA error 0.15, PJM score 0.9, precision 0.8."""
    start_s, scores = 60, {8.0: [], 0.0: []}
    for seed in range(6):
        signal = synthetic_signal(start_s + 3600, seed=seed)
        seconds = np.arange(start_s + 3600.0)
        y = np.array([signal.at(t) for t in seconds])
        for smooth_s, rows in scores.items():
            _, _, draw_w = follow([signal.mean(t, smooth_s) for t in seconds], Fleet())
            y_mean, draw_mean_w = (sample_means(seconds, v, start_s, start_s + 3600) for v in (y, draw_w))
            result = score(y_mean, draw_mean_w, FOLLOWING.base_w, FOLLOWING.range_w)
            rows.append((result.tracking_error, result.aqa_error, result.pjm, result.precision))
    tracking_error, aqa_error, pjm, precision = np.mean(scores[FOLLOWING.smooth_s], axis=0)
    assert tracking_error < 0.03
    assert aqa_error < 0.15
    assert pjm > 0.9
    assert precision > 0.8
    assert np.mean(scores[0.0], axis=0)[3] < 0.75


def test_a_fleet_that_wants_no_more_does_not_wind_the_correction_up():
    _, budget_w, _ = follow([1.0] * 300 + [-1.0] * 30, Fleet(wants_w=1000))
    assert budget_w[299] < 1.05 * 1150
    assert budget_w[-1] == pytest.approx(850 / 0.975, rel=0.01)


def test_a_budget_at_its_ceiling_does_not_wind_the_correction_up():
    following = Following(base_w=1000, range_w=150, ceiling_w=1100)
    _, budget_w, draw_w = follow([1.0] * 300 + [-1.0] * 30, Fleet(drawn_share=0.9), following)
    assert budget_w[:300].max() == 1100
    assert draw_w[301:].max() <= 851
    assert draw_w[-1] == pytest.approx(850, rel=0.01)


def test_a_fleet_at_its_lowest_caps_does_not_wind_the_correction_down():
    _, budget_w, _ = follow([-1.0] * 300 + [0.0] * 3, Fleet(drawn_share=1.05, needed_w=900))
    assert budget_w[299] == 900
    assert budget_w[300] > 950


def test_over_the_ceiling_the_signal_is_held_at_it_with_a_warning():
    following = Following(base_w=1000, range_w=150, ceiling_w=1100)
    done = step(FollowState(), following, 1.0, 0.0, FleetWatts(400, 1000, None))
    assert (done.target_w, done.budget_w) == (1100, 1100)
    assert done.warning == "the signal asks for 1150 W, over the ceiling of 1100 W: held at that"
    assert done.warning in done.reason


def test_under_the_lowest_caps_the_signal_is_held_with_the_watts_needed():
    done = step(FollowState(), FOLLOWING, -1.0, 0.0, FleetWatts(900, 1000, None))
    assert (done.target_w, done.budget_w) == (900, 900)
    assert done.warning == "the signal asks for 850 W, but the fleet at its lowest caps needs 900 W: held at that"


def test_a_ceiling_that_cannot_be_kept_is_said_to_be_so():
    done = step(FollowState(), FOLLOWING, 0.0, 0.0, FleetWatts(1300, 1300, None))
    assert done.budget_w == 1300
    assert done.warning.startswith("the ceiling of the followed signal asks for 1250 W, but the fleet at its lowest")


def test_the_reason_says_signal_target_budget_and_correction():
    state = done = step(FollowState(), FOLLOWING, 0.5, 0.0, FleetWatts(400, 1000, None))
    assert done.reason == "signal +0.50: target 1075 W, budget 1075 W (correction +0 W, nothing measured yet)"
    done = step(state, FOLLOWING, 0.5, 1.0, FleetWatts(400, 1075, 1050.0))
    assert done.reason == (
        "signal +0.50: target 1075 W, budget 1080 W (correction +5 W after a draw of 1050 W against 1075 W)"
    )


def test_a_clock_that_goes_back_or_far_ahead_does_no_harm():
    state = FollowState(trim_w=10.0, step_s=100.0, target_w=1000.0, budget_w=1010.0)
    back = step(state, FOLLOWING, 0.0, 5.0, FleetWatts(400, 1010, 900.0))
    assert back.trim_w == 10
    ahead = step(state, FOLLOWING, 0.0, 1e6, FleetWatts(400, 1010, 900.0))
    assert ahead.trim_w == 110


watt = st.floats(0.0, 5000.0)


@given(
    st.lists(
        st.tuples(
            st.floats(-1, 1), st.floats(0, 1e4), st.none() | watt | st.just(float("nan")), watt, st.floats(1, 2000)
        ),
        min_size=1,
        max_size=30,
    ),
    st.floats(100, 2000),
    st.floats(0, 500),
    st.floats(100, 3000),
)
def test_the_budget_is_never_above_the_ceiling_that_the_fleet_can_keep(steps, base_w, range_w, ceiling_w):
    following = Following(base_w, range_w, ceiling_w)
    state = FollowState()
    for y, now_s, measured_w, occupied_w, needed_w in steps:
        state = done = step(state, following, y, now_s, FleetWatts(needed_w, occupied_w, measured_w))
        assert needed_w <= done.budget_w <= max(ceiling_w, needed_w)
        assert needed_w <= done.target_w <= max(ceiling_w, needed_w)
        assert (done.warning is not None) == (not needed_w <= base_w + range_w * y <= ceiling_w or ceiling_w < needed_w)
        assert abs(state.trim_w) <= following.trim_limit * done.target_w
