"""When a window counts as steady, on readings made from known rates."""

import numpy as np
import pytest

from pals_ray.control.telemetry import Reading, between
from pals_ray.profiling.steady import SteadyRule, first_tokens, steady_window
from pals_ray.types import LATENCY_EDGES_S, EngineTelemetry, Verdicts

RULE = SteadyRule(least_s=10, least_first_tokens=4, throughput_share=0.03, power_share=0.02)
BUCKETS = len(LATENCY_EDGES_S) + 1


def readings(rate, power_w, seconds=30, requests_per_s=1.0, running=1, batch_limit=1, pace=1.0):
    """A reading a second; `rate` and `power_w` are functions of time."""
    out, tokens, energy_j = [], 0.0, 0.0
    for t in range(seconds + 1):
        ttft = [0] * BUCKETS
        ttft[50] = int(requests_per_s * t)
        engine = EngineTelemetry(
            t,
            running,
            0,
            0.1,
            0,
            round(tokens),
            0,
            0,
            batch_limit,
            8,
            0,
            Verdicts(),
            tuple(ttft),
            (0,) * BUCKETS,
            (0,) * BUCKETS,
            10 * t,
            0,
            pace * t,
            t,
        )
        out.append(Reading(float(t), engine, energy_j, 0.0))
        tokens += rate(t + 0.5)
        energy_j += power_w(t + 0.5)
    return out


def test_a_constant_load_is_steady_as_soon_as_the_window_is_long_enough():
    rows = readings(lambda t: 100, lambda t: 300)
    assert steady_window(rows[:10], RULE) == (None, "9 of 10 s")
    first, reason = steady_window(rows[:11], RULE)
    seen = between(first, rows[10])
    assert (seen.throughput_tokens_per_s, seen.power_w, first_tokens(rows[10]) - first_tokens(first)) == (100, 300, 10)
    assert reason == "steady for 10 s"


def test_a_ramp_is_left_out_of_the_window_and_the_longest_steady_rest_is_taken():
    rows = readings(lambda t: min(10 * t, 100), lambda t: 300)
    first, _ = steady_window(rows, RULE)
    assert between(first, rows[-1]).throughput_tokens_per_s > 95
    assert rows[-1].time_s - first.time_s > 15


@pytest.mark.parametrize(
    ("rate", "power_w", "says"),
    [
        (lambda t: 100 * 1.02**t, lambda t: 300, "throughput went from"),
        (lambda t: 100, lambda t: 200 + 3 * t, "power went from"),
        (lambda t: 100 if t < 22 else 0, lambda t: 300, "throughput went from"),
    ],
)
def test_what_still_moves_is_not_steady_and_the_reason_says_what_moves(rate, power_w, says):
    window, reason = steady_window(readings(rate, power_w), RULE)
    assert window is None
    assert says in reason


def test_too_few_first_tokens_make_no_window_for_a_median():
    slow = readings(lambda t: 100, lambda t: 300, requests_per_s=0.1)
    assert steady_window(slow, RULE) == (None, "3 of 4 first tokens")


def test_the_lump_of_one_engine_step_is_no_change_of_throughput():
    # 4 tokens/s of one sequence over 5 s halves: one token more or less is 5 %.
    rows = readings(lambda t: 4 if t < 5 else 4.2, lambda t: 300, seconds=10)
    assert steady_window(rows, RULE)[0] is not None
    many = readings(lambda t: 400 if t < 5 else 420, lambda t: 300, seconds=10)
    assert steady_window(many, RULE)[0] is None


def test_noise_of_single_readings_does_not_hinder():
    noise = np.random.default_rng(1).normal(1, 0.02, 100)
    rows = readings(lambda t: 100 * noise[int(t)], lambda t: 300 * noise[int(t) + 40])
    assert rows[-1].time_s - steady_window(rows, RULE)[0].time_s > 25


def test_a_host_that_is_too_busy_is_not_measured_in_the_replica_s_stead():
    empty = readings(lambda t: 100, lambda t: 300, running=6, batch_limit=8)
    assert steady_window(empty, RULE)[0] is None
    assert "6.0 of 8 run" in steady_window(empty, RULE)[1]
    slow = readings(lambda t: 100, lambda t: 300, pace=0.9)
    assert steady_window(slow, RULE)[0] is None
    assert "0.90 of the modelled speed" in steady_window(slow, RULE)[1]
    assert steady_window(readings(lambda t: 100, lambda t: 300, pace=0.97), RULE)[0] is not None
