"""The simulator against queueing theory, the physics, and common sense."""

from __future__ import annotations

import numpy as np
import pytest

from pals_ray.models.physics.roofline import RooflineModel, Workload
from pals_ray.simulation.traces import Trace
from pals_ray.types import OperatingPoint

from .worlds import poisson, run_fixed, served

FULL = OperatingPoint(400.0, 64)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.85])
def test_one_at_a_time_with_equal_prompts_waits_as_an_m_d_1_queue_does(load):
    work = Trace(np.zeros(1), np.full(1, 512), np.ones(1, dtype=int), 1.0)
    service_s = run_fixed(FULL, work, max_batch=1).models["m"].requests.ttft_s[0]
    n = 60_000
    arrival_s = np.cumsum(np.random.default_rng(4).exponential(service_s / load, n))
    requests = Trace(arrival_s, np.full(n, 512), np.ones(n, dtype=int), float(arrival_s[-1]))
    result = run_fixed(FULL, requests, duration_s=float(arrival_s[-1]) + 60.0, max_batch=1)
    waited_s = result.models["m"].requests.ttft_s - service_s
    # Pollaczek-Khinchine for a service time that does not vary.
    assert waited_s.mean() == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.05)
    assert waited_s.min() == pytest.approx(0.0, abs=1e-9)


def test_littles_law_holds_of_requests_in_the_system_and_of_sequences_that_run():
    duration_s = 900.0
    result = run_fixed(FULL, poisson(8.0, duration_s, seed=2), duration_s, replicas=2)
    requests = result.models["m"].requests
    gone_s = np.where(np.isnan(requests.finish_s), duration_s, requests.finish_s)
    in_system = (gone_s - requests.arrival_s).sum() / duration_s
    seen = sum(float((r.running + r.waiting).mean()) for r in result.replicas)
    assert seen == pytest.approx(in_system, rel=0.02)
    done = np.isfinite(requests.finish_s)
    rate = done.sum() / duration_s
    assert seen == pytest.approx(rate * (requests.finish_s - requests.arrival_s)[done].mean(), rel=0.03)


@pytest.mark.parametrize(
    ("spec", "tensor", "cap_w", "batch"),
    [("Llama-3.1-8B", 1, 400.0, 32), ("Llama-3.1-8B", 1, 180.0, 64), ("Qwen3-30B-A3B", 2, 250.0, 64)],
)
def test_a_saturated_replica_makes_the_tokens_and_draws_the_watts_that_the_roofline_says(spec, tensor, cap_w, batch):
    model = served(spec, tensor=tensor)
    said = RooflineModel(model.physics, Workload(256.0, 200.0)).predict(cap_w, float(batch))
    duration_s = 120.0
    rate = 1.3 * float(said.throughput_tokens_per_s) / 200.0
    result = run_fixed(
        OperatingPoint(cap_w, batch), poisson(rate, duration_s, seed=3), duration_s, spec=spec, tensor=tensor
    )
    late = result.time_s > 30.0
    replica = result.replicas[0]
    assert replica.waiting[late].min() > 0
    assert replica.running[late].mean() == pytest.approx(batch, rel=0.02)
    assert replica.tokens_per_s[late].mean() == pytest.approx(float(said.throughput_tokens_per_s), rel=0.06)
    assert replica.power_w[late].mean() == pytest.approx(float(said.power_w), rel=0.03)


def _means(values):
    """Mean and 95 % half width of the difference between neighbours, over seeds (rows)."""
    values = np.array(values, dtype=float)
    step = np.diff(values, axis=1)
    return step.mean(axis=0), 1.96 * step.std(axis=0, ddof=1) / np.sqrt(len(values))


def test_more_watts_give_no_fewer_tokens():
    tokens = []
    for seed in range(20):
        requests = poisson(12.0, 30.0, seed=seed)
        tokens.append([run_fixed(OperatingPoint(w, 32), requests, 30.0).tokens for w in (120.0, 180.0, 260.0, 400.0)])
    gain, half_width = _means(tokens)
    assert (gain + half_width >= 0).all()
    assert gain[0] > half_width[0] > 0


def test_more_arrivals_leave_no_fewer_waiting():
    waiting = []
    for seed in range(20):
        runs = [run_fixed(OperatingPoint(250.0, 16), poisson(r, 30.0, seed=seed), 30.0) for r in (3.0, 6.0, 9.0, 14.0)]
        waiting.append([run.replicas[0].waiting.mean() for run in runs])
    gain, half_width = _means(waiting)
    assert (gain + half_width >= 0).all()
    assert gain[-1] > half_width[-1] > 0


def test_two_replicas_share_the_load_evenly():
    result = run_fixed(FULL, poisson(10.0, 120.0, seed=5), 120.0, replicas=2)
    first, second = (replica.tokens for replica in result.replicas)
    assert first == pytest.approx(second, rel=0.1)
