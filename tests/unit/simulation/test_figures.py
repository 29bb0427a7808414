"""The figures of an evaluation, on runs small enough to work out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from pals_ray.control.budget.moving_budget import FollowedSignal
from pals_ray.control.budget.regulation import synthetic_signal
from pals_ray.control.budget.signal_following import Following
from pals_ray.simulation.results.figures import (
    counts_as_gain,
    estimate,
    figures,
    gain,
    means,
    model_figures,
    priority_figures,
    regulation_figures,
)
from pals_ray.simulation.results.run_result import (
    FINE_EDGES_S,
    Cut,
    ModelResult,
    ReplicaResult,
    RequestOutcomes,
    RunResult,
)
from pals_ray.types import Slo, Target

NAN = math.nan


def slo(priority=0, **limits):
    return Target(slo=Slo(**limits), priority=priority)


def a_model(name, target=None, itl_s=0.02):
    """Four requests: one in time, one late to start, one slow in between, one that never began; 10 s in all."""
    requests = RequestOutcomes(
        arrival_s=np.array([0.0, 0.0, 1.0, 6.0]),
        prompt_tokens=np.full(4, 100),
        output_tokens=np.array([11, 11, 11, 50]),
        first_token_s=np.array([0.5, 3.0, 1.5, NAN]),
        finish_s=np.array([0.7, 3.2, 6.5, NAN]),
        tokens=np.array([11, 11, 11, 0]),
        replica=np.zeros(4, int),
    )
    counts = np.zeros(len(FINE_EDGES_S) + 1, int)
    counts[np.searchsorted(FINE_EDGES_S, itl_s)] = 30
    return ModelResult(name, target or Target(), requests, counts)


def a_run(models, *, node_power_w=None, energy_j=2000.0, node_energy_j=2500.0, tokens=33, cuts=(), duration_s=10.0):
    steps = int(duration_s / 0.5)
    zeros = np.zeros(steps, np.float32)
    replica = ReplicaResult(
        "m#0", "m", energy_j, tokens, 0, 6, 3, zeros, zeros, zeros, zeros, zeros,
        np.full(steps, tokens / duration_s), np.full(steps, 0.25, np.float32),
    )  # fmt: skip
    node_power_w = np.full(steps, node_energy_j / duration_s) if node_power_w is None else node_power_w
    return RunResult(
        duration_s=duration_s,
        followed_s=duration_s,
        models={m.name: m for m in models},
        replicas=(replica,),
        time_s=0.5 * (1 + np.arange(steps)),
        budget_w=np.full(steps, 300.0),
        charge_w=np.full(steps, 300.0),
        power_w=np.full(steps, energy_j / duration_s),
        node_power_w=node_power_w,
        target_w=None,
        energy_j=energy_j,
        node_energy_j=node_energy_j,
        tokens=tokens,
        over_budget_s=0.0,
        over_budget_max_w=0.0,
        charge_over_s=0.0,
        stranded_w=50.0,
        cuts=cuts,
        grants=0,
    )


def test_tokens_per_joule_at_both_boundaries():
    found = figures(a_run([a_model("m")]))
    assert found["tokens_per_joule"] == pytest.approx(33 / 2500)
    assert found["tokens_per_joule_gpu"] == pytest.approx(33 / 2000)
    assert found["power_w"] == 250
    assert found["tokens_per_s"] == pytest.approx(3.3)


def test_what_came_before_the_warm_up_ended_does_not_count():
    run = a_run([a_model("m", slo(ttft_s=1.0))])
    found = figures(run, 5.0)
    assert found["tokens_per_joule"] == pytest.approx(33 / 2500)
    assert found["tokens_per_s"] == pytest.approx(3.3)
    assert found["ttft_p50_s"] == 4.0
    assert (found["good_requests"], found["late_requests"]) == (0, 1)
    found = figures(run, 0.5)
    assert (found["good_requests"], found["late_requests"]) == (1, 1)
    assert found["goodput_tokens_per_s"] == pytest.approx(11 / 9.5)


@pytest.mark.parametrize(
    ("limits", "good", "tokens"),
    [({"ttft_s": 1.0}, 2, 22), ({"tpot_s": 0.1}, 2, 22), ({"ttft_s": 1.0, "tpot_s": 0.1}, 1, 11)],
)
def test_a_request_is_good_within_both_limits(limits, good, tokens):
    found = figures(a_run([a_model("m", slo(**limits))]))
    assert found["good_requests"] == good
    assert found["attainment"] == pytest.approx(good / (good + found["late_requests"]))
    assert found["late_rate"] == pytest.approx(1.0 - found["attainment"])
    assert found["goodput_tokens_per_s"] == pytest.approx(tokens / 10.0)
    assert found["goodput_tokens_per_joule"] == pytest.approx(tokens / 2500)


def test_without_limits_all_tokens_are_good():
    found = figures(a_run([a_model("m")]))
    assert found["goodput_tokens_per_s"] == pytest.approx(found["tokens_per_s"])


def test_a_request_is_followed_beyond_the_end_and_one_that_comes_after_it_is_not_judged():
    run = a_run([a_model("m", slo(ttft_s=5.0))])
    assert figures(run)["late_requests"] == 0
    assert figures(replace(run, followed_s=12.0))["late_requests"] == 1
    assert figures(replace(run, followed_s=12.0, duration_s=6.0))["late_requests"] == 0


def test_a_request_that_never_began_counts_with_its_wait():
    found = figures(a_run([a_model("m")]))
    assert found["ttft_p99_s"] == pytest.approx(np.quantile([0.5, 3.0, 0.5, 4.0], 0.99))


def test_attainment_is_over_all_requests_and_by_class():
    fast, slow = a_model("a", slo(ttft_s=100.0)), a_model("b", slo(priority=2, ttft_s=1.0))
    found = a_run([fast, slow])
    assert figures(found)["attainment"] == pytest.approx(5 / 7)
    assert {number: part["attainment"] for number, part in priority_figures(found).items()} == {0: 1.0, 2: 0.5}
    assert priority_figures(found)[2]["goodput_tokens_per_s"] == pytest.approx(2.2)
    assert model_figures(found)["b"]["attainment"] == pytest.approx(0.5)
    assert figures(a_run([fast]), 9.0)["attainment"] is None


@pytest.mark.parametrize("waiting", [True, False])
def test_a_target_is_missed_in_means_over_each_length_and_ours_only_while_work_waits(waiting):
    steps = 240
    rate = np.tile(np.repeat([90.0, 110.0], 1), steps // 2)
    rate[:120] *= 0.9
    run = a_run([a_model("m", Target(throughput_tokens_per_s=100.0))], duration_s=120.0)
    replica = replace(run.replicas[0], tokens_per_s=rate, waiting=np.full(steps, float(waiting)))
    found = figures(replace(run, replicas=(replica,)))
    assert found["under_target_half_s"] == pytest.approx(0.75)
    assert found["under_target_5_s"] == found["under_target_60_s"] == pytest.approx(0.5)
    assert found["under_target_rate"] == pytest.approx(0.5 if waiting else 0.0)
    assert figures(a_run([a_model("m")]))["under_target_rate"] is None


def test_latencies_are_pooled_over_models():
    found = figures(a_run([a_model("a", itl_s=0.02), a_model("b", itl_s=0.08)]))
    assert found["itl_p50_s"] == pytest.approx(0.02, rel=0.02)
    assert found["itl_p99_s"] == pytest.approx(0.08, rel=0.02)


def test_changes_are_per_replica_and_minute():
    found = figures(a_run([a_model("m")]))
    assert found["decisions_per_min"] == pytest.approx(36)
    assert found["cap_changes_per_min"] == pytest.approx(18)
    assert found["binding_share"] == pytest.approx(0.25)


def test_a_cut_that_never_settles_counts_to_the_end():
    cuts = (Cut(2.0, 300, 200, 0.3, 40.0), Cut(7.0, 200, 100, None, 10.0))
    found = figures(a_run([a_model("m")], cuts=cuts))
    assert found["settle_s"] == 3.0
    assert found["settle_over_w"] == 40.0
    assert figures(a_run([a_model("m")]))["settle_s"] is None


def test_a_draw_equal_to_the_signal_is_followed_without_error():
    signal, following = synthetic_signal(1200.0, 3, every_s=10.0), Following(800.0, 150.0, 1000.0)
    power_w = np.repeat(following.base_w + following.range_w * signal.value, 20)
    run = a_run([a_model("m")], node_power_w=power_w, duration_s=1200.0)
    plan = FollowedSignal(following, tuple(signal.time_s.tolist()), tuple(signal.value.tolist()), 0.0)
    tracking, aqa, pjm, precision = regulation_figures(run, plan).values()
    assert (tracking, aqa) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    # PJM compares with the draw 10 s later, so going with the signal itself is not the best score.
    assert 0.8 < pjm < 1
    assert 0 < precision < 1
    off = regulation_figures(a_run([a_model("m")], node_power_w=power_w * 1.02, duration_s=1200.0), plan)
    assert off["tracking_error"] == pytest.approx(0.02)


def test_a_gain_counts_at_the_attainment_asked_for_or_at_statics_own():
    assert counts_as_gain(0.987, 1.0, 0.987)
    assert not counts_as_gain(0.986, 1.0, 0.987)
    assert counts_as_gain(0.97, 0.97, 0.987)
    assert counts_as_gain(None, None, 0.987)
    assert gain(1.3, 1.0) == pytest.approx(0.3)


def test_an_interval_over_seeds_is_students():
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.303 * 1 / math.sqrt(3), rel=1e-3)
    assert estimate([5.0]).half_width is None
    assert means([{"a": 1.0, "b": None}, {"a": 2.0, "b": 3.0}]) == {"a": 1.5, "b": None}
