"""The oracle: what it says of a steady replica, and that no cheaper point keeps its limits."""

from __future__ import annotations

import pytest

from pals_ray.control.snapshot import Overhead
from pals_ray.models.physics.roofline import RooflineModel, Workload
from pals_ray.models.physics.step_cost import GroupPhysics
from pals_ray.models.specs import Parallelism, find_gpu, find_model
from pals_ray.simulation.oracle import candidates, least_cap_w, steady_state
from pals_ray.types import OperatingPoint, Target

TOP = OperatingPoint(400.0, 64)


def limits_at_top(replica, demand):
    """1.25 times the p99 ITL and twice the p99 TTFT of the highest cap."""
    top = steady_state(replica, TOP, demand)
    return Target(itl_p99_s=1.25 * top.itl_p99_s, ttft_p99_s=2.0 * top.ttft_p99_s)


@pytest.fixture(scope="module")
def replica():
    physics = GroupPhysics(find_gpu("A100-SXM"), find_model("Qwen3-30B-A3B"), Parallelism(2))
    return RooflineModel(physics, Workload(1155.0, 211.0))


@pytest.fixture(scope="module")
def full(replica):
    return float(replica.predict(400.0, 64).throughput_tokens_per_s)


def test_a_steady_replica_runs_the_batch_that_its_demand_implies(replica, full):
    found = steady_state(replica, TOP, 0.7 * full)
    assert found.stable
    assert float(replica.predict(400.0, found.running).throughput_tokens_per_s) == pytest.approx(0.7 * full, rel=1e-6)


def test_more_than_a_point_serves_is_not_steady(replica, full):
    assert not steady_state(replica, TOP, 1.01 * full).stable
    assert least_cap_w(replica, 64, 1.01 * full, limits_at_top(replica, full * 0.9)) is None


def test_the_least_cap_keeps_the_limits_and_one_watt_less_does_not(replica, full):
    demand = 0.7 * full
    top = steady_state(replica, TOP, demand)
    cap_w = least_cap_w(replica, 64, demand, limits_at_top(replica, demand))
    assert 100 < cap_w < 400

    def kept(watts):
        found = steady_state(replica, OperatingPoint(watts, 64), demand)
        return found.stable and found.itl_p99_s <= 1.25 * top.itl_p99_s and found.ttft_p99_s <= 2 * top.ttft_p99_s

    assert kept(cap_w)
    assert not kept(cap_w - 1)


def test_candidates_come_cheapest_first_and_save_over_the_top(replica, full):
    overhead = Overhead(334.0, 0.06)
    found = candidates(replica, 64, 0.7 * full, limits_at_top(replica, 0.7 * full), overhead, 4)
    watts = [node_w for node_w, _ in found]
    assert watts == sorted(watts)
    top_w = overhead.charge_w(steady_state(replica, TOP, 0.7 * full).power_w, 2, 4)
    assert watts[0] < 0.85 * top_w
    assert all(point.batch_limit in (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64) for _, point in found)


def test_an_idle_replica_draws_little_more_than_idle(replica):
    found = steady_state(replica, TOP, 1.0)
    assert found.power_w < 1.1 * 2 * 80
