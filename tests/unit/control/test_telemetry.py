import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.control.telemetry import Reading, TelemetryWindow, quantile_s
from pals_ray.types import LATENCY_EDGES_S, EngineTelemetry, Verdicts

BUCKETS = len(LATENCY_EDGES_S) + 1
EMPTY = (0,) * BUCKETS


def engine(**kwargs):
    zero = EngineTelemetry(
        time_s=0, running=0, waiting=0, kv_use=0, prompt_tokens=0, generation_tokens=0, requests_finished=0,
        preemptions=0, batch_limit=16, max_batch=16, arrived=0, verdicts=Verdicts(),
        ttft_counts=EMPTY, tpot_counts=EMPTY, itl_counts=EMPTY,
    )  # fmt: skip
    return dataclasses.replace(zero, **kwargs)


def histogram(values_s):
    counts = [0] * BUCKETS
    for value in values_s:
        counts[next((i for i, edge in enumerate(LATENCY_EDGES_S) if value <= edge), BUCKETS - 1)] += 1
    return tuple(counts)


@given(st.lists(st.floats(1.1e-3, 100), min_size=1, max_size=200), st.floats(0.01, 0.99))
def test_a_histogram_quantile_is_within_a_bucket_of_the_true_one(values, q):
    true = sorted(values)[max(0, -(-int(q * len(values) * 1e6) // 10**6) - 1)]
    got = quantile_s(histogram(values), q)
    position = sorted(values).index(true)
    neighbours = sorted(values)[max(0, position - 1) : position + 2]
    assert min(neighbours) / 1.11 <= got <= max(neighbours) * 1.11


def test_an_empty_histogram_has_no_quantile():
    assert quantile_s(EMPTY, 0.5) is None


def test_rates_are_over_the_short_window_and_latencies_over_the_long_one():
    window = TelemetryWindow(rate_s=5, latency_s=60)
    for t in range(31):
        tokens = 100 * t if t <= 20 else 2000 + 10 * (t - 20)
        itl = histogram([0.02] * 90 + [0.5] * 10) if t >= 1 else EMPTY
        window.add(
            Reading(t, engine(generation_tokens=tokens, itl_counts=itl, running=3), energy_j=200.0 * t, power_w=1)
        )
    seen = window.summary()
    assert seen.throughput_tokens_per_s == pytest.approx(10)
    assert seen.power_w == pytest.approx(200)
    assert seen.itl.p50_s == pytest.approx(0.02, rel=0.11)
    assert seen.itl.p99_s == pytest.approx(0.5, rel=0.11)
    assert seen.ttft.p50_s is None
    assert seen.running == 3


def test_what_arrives_is_told_over_both_windows_served_or_not():
    window = TelemetryWindow(rate_s=5, latency_s=60)
    for t in range(121):
        # One request of 100 tokens a second comes in, and two in the last 10 s; every other one has to wait.
        came = t + max(t - 110, 0)
        ended = t // 2
        reading = engine(
            time_s=t, arrived=came, generation_tokens=100 * ended + 200, prompt_tokens=30 * (ended + 4),
            requests_finished=ended, running=4, waiting=came - ended - 4,
        )  # fmt: skip
        window.add(Reading(t, reading, energy_j=0.0, power_w=1))
        if t == 0:
            assert window.summary().output_tokens == 0.0
    seen = window.summary()
    assert seen.arriving_per_s == pytest.approx(2.0)
    assert seen.arriving_long_per_s == pytest.approx(70 / 60)
    assert (seen.prompt_tokens, seen.output_tokens) == (pytest.approx(30), pytest.approx(100, rel=0.01))


def test_what_ran_is_told_as_it_is_now_on_average_and_at_least():
    window = TelemetryWindow(rate_s=5, latency_s=60)
    for t, running in enumerate((40, 40, 40, 8, 8, 0, 8, 6)):
        window.add(Reading(t, engine(running=running), energy_j=0.0, power_w=1))
    seen = window.summary()
    assert (seen.running, seen.running_mean, seen.running_least) == (6, 6.0, 0)


def test_power_is_known_before_the_engine_is():
    window = TelemetryWindow()
    window.add(Reading(0, None, energy_j=10, power_w=55))
    assert window.summary().power_w == 55
    window.add(Reading(2, None, energy_j=130, power_w=55))
    assert window.summary().power_w == pytest.approx(60)


def test_a_clock_that_went_back_does_not_make_rates_negative():
    window = TelemetryWindow()
    window.add(Reading(10, engine(generation_tokens=100), energy_j=100, power_w=50))
    window.add(Reading(3, engine(generation_tokens=120), energy_j=110, power_w=50))
    assert window.summary().power_w == 50
