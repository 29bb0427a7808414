"""What a replica's controller takes from arrivals: their rate, their swings, and surges that are no chance."""

from __future__ import annotations

import numpy as np
import pytest

from pals_ray.control.replica.demand import DemandState, pooled, toward
from pals_ray.control.snapshot import Arrivals, LatencyFactors
from pals_ray.control.telemetry import RATE_S
from pals_ray.types import ReplicaTelemetry

BEAT_S = 0.5


def watched(state, counts):
    """The state after so many arrivals in each beat."""
    window = [counts[0]] * round(RATE_S / BEAT_S)
    for count in counts:
        window = [*window[1:], count]
        state = state.after(ReplicaTelemetry(arriving_per_s=sum(window) / RATE_S), BEAT_S)
    return state


def arrivals(state, **seen):
    return state.arrivals(ReplicaTelemetry(**{"running": 1, "output_tokens": 100.0} | seen), 0.0, LatencyFactors())


def test_a_poisson_rate_is_found_and_called_poisson():
    rng = np.random.default_rng(5)
    state = watched(DemandState(), rng.poisson(2.0, 1200).tolist())
    assert state.per_s == pytest.approx(4.0, rel=0.1)
    assert arrivals(state).peakedness < 1.4
    assert arrivals(state).tokens_per_s == pytest.approx(400.0, rel=0.1)


def test_arrivals_in_bunches_are_known_by_their_dispersion():
    rng = np.random.default_rng(5)
    bunches = (10 * rng.poisson(0.2, 1200)).tolist()
    assert arrivals(watched(DemandState(), bunches)).peakedness > 3.0


def test_a_surge_is_followed_at_once_and_a_lull_slowly():
    calm = watched(DemandState(), [2] * 400)
    surge = watched(calm, [12] * 10)
    assert surge.per_s > 12.0
    lull = watched(calm, [0] * 10)
    assert lull.per_s > 3.5


def test_silence_is_no_demand_and_a_first_request_is_unknown_until_one_has_ended():
    silent = watched(watched(DemandState(), [2] * 400), [0] * 1200)
    assert arrivals(silent, running=0).per_s == 0.0
    assert arrivals(silent, running=1).per_s > 0.0
    assert arrivals(DemandState(), running=3, output_tokens=0.0) is None
    assert arrivals(DemandState(), running=0, output_tokens=0.0).per_s == 0.0


def test_a_load_that_rises_steadily_does_not_count_as_one_that_swings():
    rng = np.random.default_rng(5)
    state = watched(DemandState(), rng.poisson(np.linspace(0.1, 5.0, 480)).tolist())
    assert arrivals(state).peakedness < 1.5


def test_while_more_run_than_usual_less_is_a_surge():
    calm = DemandState(per_s=1.0, running=10.0, seen_s=1000.0)
    busier = [ReplicaTelemetry(arriving_per_s=2.5, running_mean=ran) for ran in (10.0, 30.0)]
    usual, crowded = (calm.after(seen, BEAT_S) for seen in busier)
    assert usual.per_s == pytest.approx(1.0, rel=0.05)
    assert crowded.per_s > 1.5


def test_replicas_alike_plan_for_their_mean_as_far_as_a_rate_can_be_that_by_chance():
    few, many = Arrivals(3.8, 100.0, strain=1.0), Arrivals(4.2, 200.0, strain=1.21)
    mean = pooled([few, many])
    assert (mean.per_s, mean.strain) == (pytest.approx(4.0), pytest.approx(1.1))
    assert mean.tokens_per_s == pytest.approx((few.tokens_per_s + many.tokens_per_s) / 2)
    assert toward(few, mean) == toward(many, mean) == toward(None, mean) == mean
    far = toward(Arrivals(20.0, 100.0), mean)
    assert 4.0 < far.per_s < 20.0
    assert toward(Arrivals(0.0, 1.0), mean).per_s == 0.0
