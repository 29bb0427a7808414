"""What benchmarks make of their measurements, on measurements whose figures are known."""

import math

import numpy as np
import pytest

from pals_ray.bench import overhead as bench_overhead
from pals_ray.bench import policies as bench_policies
from pals_ray.bench import reaction as bench_reaction
from pals_ray.bench import regulation as bench_regulation
from pals_ray.bench.served_fleet import Watch, default_fleet
from pals_ray.config.fleet import parse_fleet_config
from pals_ray.control.budget.regulation import synthetic_signal
from pals_ray.types import Verdicts

WATTS = {"base_w": 800.0, "range_w": 120.0, "ceiling_w": 1150.0}


def watched(power_w, duration_s, every_s=0.5):
    """A watch of a fleet that draws `power_w(t)` at t."""
    time_s = np.arange(0.0, duration_s + every_s, every_s)
    energy_j = np.concatenate(([0.0], np.cumsum([power_w(t) * every_s for t in time_s[:-1]])))
    return Watch((7000.0 + time_s).tolist(), energy_j.tolist(), list(range(len(time_s))))


def test_a_draw_on_the_signal_has_no_error_and_one_beside_it_has_it_as_a_share_of_the_target():
    signal = synthetic_signal(900, seed=3)
    exact, _, drawn_w = bench_regulation.judge(signal, watched(lambda t: 800 + 120 * signal.at(t), 900), **WATTS)
    assert len(drawn_w) == 90
    assert exact["tracking_error"] == pytest.approx(0, abs=1e-9)
    above, *_ = bench_regulation.judge(signal, watched(lambda t: 1.05 * (800 + 120 * signal.at(t)), 900), **WATTS)
    assert above["tracking_error"] == pytest.approx(0.05)
    assert above["precision"] < exact["precision"]


def test_a_draw_ten_seconds_late_has_full_precision():
    signal = synthetic_signal(900, seed=3)
    late, *_ = bench_regulation.judge(signal, watched(lambda t: 800 + 120 * signal.at(max(t - 10, 0)), 900), **WATTS)
    assert late["precision"] == pytest.approx(1, abs=0.01)


def test_too_short_a_run_has_an_error_and_no_score():
    signal = synthetic_signal(60, seed=3)
    short, *_ = bench_regulation.judge(signal, watched(lambda t: 800.0, 60), **WATTS)
    assert "precision" not in short
    assert math.isfinite(short["tracking_error"])


def test_a_watch_says_mean_watts_tokens_and_attainment():
    seen = watched(lambda t: 500.0, 10)
    assert seen.rates() == pytest.approx((500, 2, 0.004))
    assert seen.attainment is None
    seen.verdicts = {"a": Verdicts(good=26, late_ttft=1, late_tpot=2), "b": Verdicts(good=1)}
    assert seen.attainment == 0.9


def test_policies_are_compared_by_their_means():
    rows = (("uniform", 0.2, 0.4, 0), ("pals", 0.1, 0.5, 1), ("pals", 0.0, 0.7, 0), ("uniform", 0.4, 0.4, 0))
    runs = [bench_policies.Run(policy, share, rate, 100.0, 550.0, failed) for policy, share, rate, failed in rows]
    said = bench_policies.figures(runs, "uniform")
    assert said["uniform_attainment"] == pytest.approx(0.3)
    assert said["pals_attainment"] == pytest.approx(0.05)
    assert said["pals_tokens_per_j"] == pytest.approx(0.6)
    assert said["failures"] == 1


def test_the_interval_of_a_ratio_holds_its_median_and_shrinks_with_more_pairs():
    rng = np.random.default_rng(5)
    few, many = (bench_overhead.ratio(rng.normal(0.99, 0.02, n)) for n in (6, 60))
    for median, low, high in (few, many):
        assert low <= median <= high
    assert many[2] - many[1] < few[2] - few[1]
    assert bench_overhead.ratio(np.array([0.9, 0.9, 0.9])) == (0.9, 0.9, 0.9)


def test_the_fleet_of_the_overhead_bench_is_one_model_whose_worker_takes_no_time_from_its_gpu():
    (model,) = parse_fleet_config(bench_overhead.unpaced_fleet(), "bench").models
    assert model.model_id == "tiny-dense"
    assert model.llm_config["engine_kwargs"]["worker_cls"] == bench_overhead.UNPACED
    assert len(parse_fleet_config(default_fleet(), "bench").models) == 2


def test_reaction_is_judged_over_cuts_and_raises_together():
    steps = [(1000 if i % 2 else -500, float(i)) for i in range(1, 101)]
    assert bench_reaction.figures(steps) == {"p50_ms": 50.5, "p99_ms": pytest.approx(99.01), "steps": 100}
