"""Measurement holds: one replica at a point, the others inside the rest of every budget, and nothing for ever."""

import pytest

from pals_ray.control.allocation.measurement_holds import HOLD_LEASE_S, Hold, HoldRefused, MeasurementHolds
from pals_ray.control.snapshot import Domain, Share
from pals_ray.types import OperatingPoint
from policies import uniform
from tests.support.builders import fleet_snapshot, replica_snapshot


def fleet(now_s=0.0, budget_w=1000.0, replicas=("a", "b", "c"), **more):
    rows = tuple(replica_snapshot(name) if isinstance(name, str) else name for name in replicas)
    return fleet_snapshot(budget_w, *rows, now_s=now_s, parked_charge_w={None: 100.0}, **more)


def hold(cap_w=300.0, batch=4, owner="me", until_s=HOLD_LEASE_S):
    return Hold(owner, OperatingPoint(cap_w, batch), cap_w, until_s)


def divide(holds, snapshot):
    return holds.divide(snapshot, lambda rest: uniform.allocate(rest, {}))


def test_a_held_replica_gets_its_point_first_and_the_others_all_that_is_left():
    holds = MeasurementHolds()
    assert holds.take(fleet(), "b", hold())
    shares = divide(holds, fleet())
    assert next(iter(shares)) == "b"
    assert (shares["b"].charge_w, shares["b"].pin_cap_w, shares["b"].pin_batch_limit) == (300, 300, 4)
    assert shares["a"].charge_w == shares["c"].charge_w == 300
    assert shares["a"].pin_cap_w is shares["a"].pin_batch_limit is None


def test_a_hold_lapses_unless_it_is_renewed():
    holds = MeasurementHolds()
    holds.take(fleet(), "b", hold())
    assert not holds.take(fleet(now_s=4), "b", hold(until_s=4 + HOLD_LEASE_S)), "a renewal is no new point"
    assert divide(holds, fleet(now_s=8.9))["b"].pin_cap_w == 300
    assert divide(holds, fleet(now_s=9))["b"].pin_cap_w is None
    assert divide(holds, fleet(now_s=3))["b"].pin_cap_w is None, "what has lapsed is forgotten"


def test_a_cap_that_the_budget_does_not_allow_is_refused_with_the_watts_needed():
    holds = MeasurementHolds()
    with pytest.raises(HoldRefused, match=" 50 W more are needed"):
        holds.take(fleet(budget_w=550), "b", hold(300))
    assert holds.take(fleet(budget_w=550), "b", hold(250))
    with pytest.raises(HoldRefused):
        holds.take(fleet(budget_w=550), "a", hold(150, owner="other"))


def test_a_domain_limits_what_can_be_held_in_it():
    rows = (replica_snapshot("a", domain="rack"), replica_snapshot("b", domain="rack"), replica_snapshot("c"))
    snapshot = fleet(budget_w=2000, replicas=rows, domains=(Domain("rack", 450.0),))
    assert MeasurementHolds().room_w(snapshot, "a") == (350, "rack")
    with pytest.raises(HoldRefused, match="rack leaves it 350 W"):
        MeasurementHolds().take(snapshot, "a", hold(400))


def test_a_hold_that_a_lower_budget_has_no_room_for_ends():
    holds = MeasurementHolds()
    holds.take(fleet(), "b", hold(400))
    shares = divide(holds, fleet(budget_w=600))
    assert shares["b"].pin_cap_w is None
    assert sum(share.charge_w for share in shares.values()) == pytest.approx(500)


def test_nobody_else_renews_or_releases_a_live_hold():
    holds = MeasurementHolds()
    holds.take(fleet(), "b", hold())
    with pytest.raises(HoldRefused, match="another profiler"):
        holds.take(fleet(now_s=1), "b", hold(owner="you"))
    holds.release("b", "you")
    assert divide(holds, fleet(now_s=1))["b"].pin_cap_w == 300
    holds.release("b", "me")
    assert divide(holds, fleet(now_s=1))["b"].pin_cap_w is None
    assert holds.take(fleet(now_s=1), "b", hold(owner="you"))


def test_a_replica_that_does_not_serve_cannot_be_held_and_one_that_left_is_held_no_more():
    holds = MeasurementHolds()
    with pytest.raises(HoldRefused, match="does not serve"):
        holds.take(fleet(), "z", hold())
    holds.take(fleet(), "b", hold())
    assert set(divide(holds, fleet(replicas=("a",)))) == {"a"}


def test_with_all_held_the_policy_is_not_asked():
    holds = MeasurementHolds()
    holds.take(fleet(replicas=("a",)), "a", hold())

    def policy(_):
        pytest.fail("asked to divide among nobody")

    assert holds.divide(fleet(replicas=("a",)), policy) == {
        "a": Share(300, "held at 300 W, batch limit 4, to be measured", 300, 4)
    }
