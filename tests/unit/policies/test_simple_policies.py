"""Uniform and proportional: who gets what."""

from __future__ import annotations

import pytest

from pals_ray.control.snapshot import Domain
from pals_ray.errors import PalsError
from pals_ray.types import ReplicaTelemetry
from policies import proportional, uniform
from tests.support.builders import fleet_snapshot, replica_snapshot


def watts(policy, budget_w, *replicas, domains=()):
    shares = policy.allocate(fleet_snapshot(budget_w, *replicas, domains=domains), {})
    return {name: pytest.approx(share.charge_w) for name, share in shares.items()}


def test_uniform_splits_by_gpu_count():
    assert watts(uniform, 600, replica_snapshot("a"), replica_snapshot("b", gpus=3)) == {"a": 150, "b": 450}


def test_uniform_hands_on_what_a_domain_or_a_replica_cannot_take():
    rack = Domain("rack", 150)
    small = replica_snapshot("c", most_charge_w=120)
    assert watts(uniform, 600, replica_snapshot("a", domain="rack"), replica_snapshot("b"), small, domains=(rack,)) == {
        "a": 150,
        "b": 330,
        "c": 120,
    }


def test_uniform_gives_the_least_where_even_that_is_over_the_budget():
    assert watts(uniform, 150, replica_snapshot("a"), replica_snapshot("b")) == {"a": 100, "b": 100}


def test_a_reason_names_the_budget_that_holds_a_replica_down():
    snapshot = fleet_snapshot(
        900, replica_snapshot("a", domain="rack"), replica_snapshot("b"), domains=(Domain("rack", 150),)
    )
    shares = uniform.allocate(snapshot, {})
    assert "rack's 150 W" in shares["a"].reason
    assert "its most" in shares["b"].reason


def test_an_unknown_domain_is_refused_with_the_declared_ones():
    with pytest.raises(PalsError, match=r"rack9.*declared are: rack"):
        watts(uniform, 600, replica_snapshot("a", domain="rack9"), domains=(Domain("rack", 150),))


def test_domains_inside_themselves_are_refused():
    with pytest.raises(PalsError, match="do not form a tree"):
        watts(uniform, 600, replica_snapshot("a"), domains=(Domain("x", 150, "y"), Domain("y", 150, "x")))


def test_proportional_follows_demand():
    assert watts(proportional, 500, replica_snapshot("a", demand=300), replica_snapshot("b", demand=200)) == {
        "a": 300,
        "b": 200,
    }


def test_proportional_spreads_what_demand_leaves_over():
    assert watts(proportional, 650, replica_snapshot("a", demand=10), replica_snapshot("b", demand=0)) == {
        "a": 400,
        "b": 250,
    }


@pytest.mark.parametrize("dust", [5e-324, 1e-300])
def test_proportional_takes_next_to_no_demand_for_none(dust):
    assert watts(proportional, 500, replica_snapshot("a", demand=300), replica_snapshot("b", demand=dust)) == {
        "a": 400,
        "b": 100,
    }
    assert watts(proportional, 300, replica_snapshot("a", demand=dust)) == {"a": 300}


def test_proportional_counts_requests_where_a_demand_is_unknown():
    busy = replica_snapshot("a", demand=5, telemetry=ReplicaTelemetry(running=10, waiting=20))
    calm = replica_snapshot("b", telemetry=ReplicaTelemetry(running=15))
    assert watts(proportional, 450, busy, calm) == {"a": 300, "b": 150}
