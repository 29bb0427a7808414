"""The queueing model: what share of the requests is answered within the SLO, at each cap and batch limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.control.replica.attainment import QueueingModel
from pals_ray.control.replica.batch_choice import graph_sizes
from pals_ray.control.replica.prediction import predict_at
from pals_ray.control.snapshot import Arrivals, LatencyFactors
from pals_ray.types import Slo

from .plant import Decode

CAPS_W = np.array([100.0, 150.0, 200.0, 300.0, 400.0])
ON = predict_at(Decode(), CAPS_W, np.array(graph_sizes(64), dtype=float))
FULL = np.full(len(CAPS_W), len(ON.batch) - 1)


def attained(on, column, arrivals, slo):
    return QueueingModel.of(on, arrivals, slo).attained(column, arrivals)


def column_of(batch):
    return np.full(len(CAPS_W), int(np.searchsorted(ON.batch, batch)))


def simulated(rate_per_s, limit, capacity, wait_s, for_s=20_000.0, output=20.0, seed=3):
    """A birth-death chain, event by event: the share of arrivals that start within `wait_s`, and the mean running."""
    rng = np.random.default_rng(seed)
    now_s, inside, area, kept, came = 0.0, 0, 0.0, 0, 0
    while now_s < for_s:
        ends = float(capacity[min(inside, limit)]) / output if inside else 0.0
        step_s = rng.exponential(1.0 / (rate_per_s + ends))
        area += min(inside, limit) * step_s
        now_s += step_s
        if rng.random() < rate_per_s / (rate_per_s + ends):
            came += 1
            kept += inside < limit or (inside - limit + 1) * output / float(capacity[limit]) <= wait_s
            inside += 1
        else:
            inside -= 1
    return kept / came, area / now_s


@pytest.mark.parametrize(("tokens_per_s", "limit"), [(60.0, 8), (55.0, 16), (120.0, 32), (90.0, 64)])
def test_it_agrees_with_a_simulated_queue(tokens_per_s, limit):
    slo, arrivals = Slo(ttft_s=2.0), Arrivals(tokens_per_s / 20.0, 20.0)
    found = attained(ON, column_of(limit), arrivals, slo)
    row = len(CAPS_W) - 1
    batches = np.arange(1, limit + 1)
    capacity = np.concatenate(([1.0], Decode().predict(CAPS_W[row], batches).throughput_tokens_per_s))
    wait_s = 2.0 - float(ON.ttft_p50_s[row, 0])
    share, running = simulated(tokens_per_s / 20.0, limit, capacity, wait_s)
    assert found.attainment[row] == pytest.approx(share, abs=0.02)
    assert found.running[row] == pytest.approx(running, rel=0.05)


def test_more_than_is_served_leaves_nobody_on_time_but_those_that_are_let_in():
    most = float(ON.capacity_tokens_per_s[-1, -1])
    found = attained(ON, FULL, Arrivals(2.0 * most / 20.0, 20.0), Slo(ttft_s=2.0))
    assert found.attainment[-1] < 1e-6
    assert found.good_share[-1] == pytest.approx(0.5, abs=0.02)
    assert found.running[-1] == pytest.approx(64.0, rel=0.01)


def test_without_limits_whatever_is_served_is_good():
    assert attained(ON, FULL, Arrivals(4.0, 20.0), Slo()).attainment[-1] == pytest.approx(1.0)
    most = float(ON.capacity_tokens_per_s[-1, -1])
    assert attained(ON, FULL, Arrivals(1.1 * most / 20.0, 20.0), Slo()).attainment[-1] < 0.1


def test_nothing_that_comes_is_served_on_time_at_the_latencies_of_one_request():
    found = attained(ON, FULL, Arrivals(0.0, 20.0), Slo(ttft_s=0.1))
    assert found.attainment[-1] == pytest.approx(1.0, abs=1e-3)  # 20 / 400 s
    assert found.attainment[0] == pytest.approx(0.0, abs=1e-3)  # 20 / 100 s
    assert found.running == pytest.approx(0.0, abs=1e-6)


@given(
    tokens=st.floats(0.0, 500.0),
    output=st.floats(1.0, 2000.0),
    peakedness=st.floats(1.0, 8.0),
    ttft_s=st.none() | st.floats(1e-3, 100.0),
    tpot_s=st.none() | st.floats(1e-3, 10.0),
    limit=st.sampled_from(graph_sizes(64)),
    factor=st.floats(0.2, 8.0),
)
def test_shares_are_shares_and_more_arrivals_are_never_answered_better(
    tokens, output, peakedness, ttft_s, tpot_s, limit, factor
):
    slo = Slo(ttft_s=ttft_s, tpot_s=tpot_s)
    latency = LatencyFactors(factor, factor, factor)
    arrivals = Arrivals(tokens / output, output, peakedness, latency=latency)
    found = attained(ON, column_of(limit), arrivals, slo)
    more = attained(ON, column_of(limit), arrivals.times(1.2), slo)
    for values in (found.attainment, found.good_share):
        assert np.isfinite(values).all()
        assert ((values >= 0.0) & (values <= 1.0 + 1e-9)).all()
    assert (found.running <= limit + 1e-6).all()
    assert (found.good_share >= found.attainment - 1e-9).all()
    assert (more.attainment <= found.attainment + 1e-6).all()


def test_arrivals_that_swing_more_are_answered_worse_near_capacity():
    calm = attained(ON, FULL, Arrivals(9.0, 20.0), Slo(ttft_s=2.0)).attainment[-1]
    swinging = attained(ON, FULL, Arrivals(9.0, 20.0, peakedness=4.0), Slo(ttft_s=2.0)).attainment[-1]
    assert swinging < calm


def test_latencies_longer_than_predicted_and_strain_lower_what_is_attained():
    slo = Slo(ttft_s=0.08, tpot_s=0.3)
    plain = attained(ON, FULL, Arrivals(7.0, 20.0), slo).attainment[-1]
    slower = attained(ON, FULL, Arrivals(7.0, 20.0, latency=LatencyFactors(1.5, 2.0, 1.5)), slo).attainment[-1]
    strained = attained(ON, FULL, Arrivals(7.0, 20.0, strain=1.3), slo).attainment[-1]
    assert slower < plain
    assert strained < plain
