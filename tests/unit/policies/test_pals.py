"""The default policy and the baselines beside it: who gets what, and when the present division stays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pals_ray.control.allocation.division_adoption import adoption
from pals_ray.control.allocation.policy_shares import falls_short, targets_tokens_per_s
from pals_ray.control.snapshot import Domain
from pals_ray.errors import InfeasibleBudget
from pals_ray.types import ReplicaTelemetry, Target
from policies import batch_only, exact, pals, power_only, slack_steal, static
from tests.support.builders import StubModel, fleet_snapshot, replica_snapshot


@pytest.fixture
def models():
    return {"m": StubModel()}


def watts(shares):
    return {name: share.charge_w for name, share in shares.items()}


def test_pals_gives_watts_to_whom_the_models_say_they_serve(models):
    busy, calm = replica_snapshot("busy", demand=200), replica_snapshot("calm", demand=20)
    shares = pals.allocate(fleet_snapshot(450, busy, calm), models)
    assert shares["busy"].charge_w > 280
    assert shares["busy"].pin_cap_w is shares["busy"].pin_batch_limit is None
    assert "tokens/s predicted at" in shares["busy"].reason


def test_pals_leaves_spare_watts_within_natural_draw_and_headroom(models):
    shares = pals.allocate(
        fleet_snapshot(1000, replica_snapshot("a", demand=100), replica_snapshot("b", demand=0.0)), models
    )
    # Some 15 run for 100 tokens/s uncapped, which draw 140 W; and nothing is asked of b, whose one would draw 84 W.
    assert watts(shares) == {"a": 154, "b": 100}


def test_pals_serves_classes_in_order_and_keeps_minimum_shares(models):
    first = replica_snapshot("first", demand=200)
    second = replica_snapshot("second", demand=200, target=Target(priority=1, weight=9.0))
    keeps = replica_snapshot("keeps", demand=200, target=Target(priority=1, min_share=0.5))
    alone = watts(pals.allocate(fleet_snapshot(400, first, second), models))
    assert alone["first"] > 280
    beside = watts(pals.allocate(fleet_snapshot(400, first, keeps), models))
    assert 100 < beside["keeps"] < beside["first"] < alone["first"]


def test_pals_keeps_a_division_that_is_within_one_percent(models):
    a, b = replica_snapshot("a", demand=100, grant_w=160), replica_snapshot("b", demand=100, grant_w=155)
    shares = pals.allocate(fleet_snapshot(320, a, b), models)
    assert watts(shares) == {"a": 160, "b": 155}
    assert "kept" in shares["a"].reason


def test_pals_hands_out_what_a_budget_that_rose_by_a_little_leaves_free(models):
    a, b = replica_snapshot("a", demand=100, grant_w=140), replica_snapshot("b", demand=100, grant_w=140)
    risen = fleet_snapshot(282, a, b)
    assert watts(pals.allocate(risen, models)) == {"a": 140, "b": 140}
    shares = pals.allocate(replace(risen, budget_moved_w=2.0), models)
    assert sum(watts(shares).values()) == pytest.approx(282)
    assert "the budget has moved and leaves 2 W free" in shares["a"].reason
    assert watts(pals.allocate(replace(fleet_snapshot(280.1, a, b), budget_moved_w=0.1), models)) == {
        "a": 140,
        "b": 140,
    }


def test_pals_hands_idle_watts_over_at_once_after_a_cut_that_squeezed_all_alike(models):
    busy, idle = replica_snapshot("busy", demand=100, grant_w=150), replica_snapshot("idle", demand=0.0, grant_w=150)
    squeezed = replace(fleet_snapshot(300, busy, idle), budget_moved_w=-300.0)
    shares = pals.allocate(squeezed, models)
    assert shares["busy"].charge_w > 150
    assert "the budget fell by 300 W" in shares["busy"].reason
    assert "the budget fell" not in pals.allocate(replace(squeezed, budget_moved_w=-0.5), models)["busy"].reason


def test_pals_gives_free_watts_to_whom_a_grant_holds_down_even_if_it_serves_all_that_is_asked(models):
    held = ReplicaTelemetry(running=16, power_w=110, binding_share=1.0)
    a = replica_snapshot("a", demand=60, grant_w=110, charge_w=110, telemetry=held, natural_draw_w=144.0)
    idle = replica_snapshot("idle", demand=0.0, grant_w=300, charge_w=100)
    shares = pals.allocate(fleet_snapshot(420, a, idle), models)
    assert shares["a"].charge_w == 158
    assert "more for a, held by their grants" in shares["a"].reason
    # It has room under its grant: its cap is of its own choosing.
    chosen = replace(a, grant_w=158, charge_w=110)
    assert "kept" in pals.allocate(fleet_snapshot(420, chosen, replace(idle, grant_w=100)), models)["a"].reason


def test_pals_takes_no_watts_for_that_from_whom_a_cap_holds_down(models):
    held = ReplicaTelemetry(running=16, power_w=110, binding_share=1.0)
    a = replica_snapshot("a", demand=60, grant_w=110, charge_w=110, telemetry=held, natural_draw_w=144.0)
    other = replica_snapshot("other", demand=100, grant_w=160, charge_w=160, telemetry=held, natural_draw_w=110.0)
    shares = pals.allocate(fleet_snapshot(270, a, other), models)
    assert watts(shares) == {"a": 110, "other": 160}


def test_pals_moves_when_the_present_grants_are_over_a_budget(models):
    a = replica_snapshot("a", demand=100, grant_w=160, domain="rack")
    shares = pals.allocate(fleet_snapshot(320, a, domains=(Domain("rack", 150),)), models)
    assert shares["a"].charge_w <= 150
    assert "rack's grants are 10 W over" in shares["a"].reason


def test_pals_helps_who_falls_short_for_less_than_one_percent(models):
    starved = replica_snapshot(
        "starved",
        demand=100,
        grant_w=137,
        telemetry=ReplicaTelemetry(running=16, waiting=4, throughput_tokens_per_s=90),
    )
    others = [replica_snapshot(f"r{i}", demand=100, grant_w=160) for i in range(5)]
    shares = pals.allocate(fleet_snapshot(1000, starved, *others), models)
    assert shares["starved"].charge_w > 140
    assert "starved, which fall short" in shares["starved"].reason


def test_a_replica_without_a_model_is_served_by_its_natural_draw(models):
    shares = pals.allocate(fleet_snapshot(1000, replica_snapshot("a", model="new", natural_draw_w=200.0)), models)
    assert shares["a"].charge_w == 220
    assert "no model yet" in shares["a"].reason


def test_an_empty_fleet_has_nothing_to_divide():
    for policy in (pals, exact, power_only, batch_only, slack_steal, static):
        assert policy.allocate(fleet_snapshot(1000), {}) == {}


def test_exact_agrees_with_pals_on_a_new_division(models):
    replicas = [replica_snapshot(f"r{i}", demand=40.0 * i, grant_w=0.0) for i in range(5)]
    snapshot = fleet_snapshot(900, *replicas, domains=(Domain("rack", 400),))
    assert watts(exact.allocate(snapshot, models)) == pytest.approx(watts(pals.allocate(snapshot, models)), abs=3)


def test_static_runs_everything_at_maximum_or_says_what_that_needs(models):
    replicas = (replica_snapshot("a"), replica_snapshot("b", gpus=2), replica_snapshot("c", parked=True))
    shares = static.allocate(fleet_snapshot(1300, *replicas), models)
    assert [(s.charge_w, s.pin_cap_w, s.pin_batch_limit) for s in shares.values()] == [
        (400, 400, 64),
        (800, 400, 64),
        (100, None, None),
    ]
    with pytest.raises(InfeasibleBudget, match="1300 W needed"):
        static.allocate(fleet_snapshot(1000, *replicas), models)
    with pytest.raises(InfeasibleBudget, match=r"399 W asked.*rack"):
        static.allocate(fleet_snapshot(1000, replica_snapshot(domain="rack"), domains=(Domain("rack", 399),)), models)


def test_batch_only_pins_the_cap_that_an_even_split_pays_for(models):
    shares = batch_only.allocate(fleet_snapshot(600, replica_snapshot("a"), replica_snapshot("b", gpus=2)), models)
    assert {name: s.pin_cap_w for name, s in shares.items()} == pytest.approx({"a": 200, "b": 200})
    assert shares["a"].pin_batch_limit is None


def test_power_only_pins_the_batch_limit_and_moves_watts(models):
    snapshot = fleet_snapshot(
        450, replica_snapshot("busy", demand=200), replica_snapshot("calm", demand=20, max_batch=32)
    )
    shares = power_only.allocate(snapshot, models)
    assert {name: s.pin_batch_limit for name, s in shares.items()} == {"busy": 64, "calm": 32}
    assert shares["busy"].charge_w > 280
    assert power_only.allocate(snapshot, models, batch_limit=48)["busy"].pin_batch_limit == 48


def test_slack_steal_moves_what_does_not_bind_to_whom_is_held():
    held = replica_snapshot("held", natural_draw_w=380.0, telemetry=ReplicaTelemetry(binding_share=1.0))
    slack = replica_snapshot("slack", natural_draw_w=120.0)
    shares = slack_steal.allocate(fleet_snapshot(480, held, slack), {})
    assert watts(shares) == pytest.approx({"held": 348, "slack": 132})
    assert "held by its cap" in shares["held"].reason


def test_targets_are_divided_by_demand_and_evenly_where_that_is_unknown():
    target = Target(throughput_tokens_per_s=90)
    by_demand = fleet_snapshot(0, *(replica_snapshot(str(d), demand=d, target=target) for d in (10, 20, 0)))
    assert targets_tokens_per_s(by_demand) == {"10": 30, "20": 60, "0": 0}
    unknown = fleet_snapshot(0, replica_snapshot("a", target=target), replica_snapshot("b", target=target, demand=3))
    assert targets_tokens_per_s(unknown) == {"a": 45, "b": 45}
    parked = fleet_snapshot(0, replica_snapshot("a", target=target, parked=True), replica_snapshot("b", target=target))
    assert targets_tokens_per_s(parked) == {"a": None, "b": 90}


def test_who_has_a_queue_under_the_target_falls_short():
    def seen(**telemetry):
        return replica_snapshot(telemetry=ReplicaTelemetry(running=1, **telemetry))

    assert falls_short(seen(waiting=1, throughput_tokens_per_s=94), 100)
    assert not falls_short(seen(waiting=1, throughput_tokens_per_s=95), 100)
    assert not falls_short(seen(waiting=0, throughput_tokens_per_s=10), 100)


@pytest.mark.parametrize(
    ("present", "new", "adopts"),
    [([1.0], [1.02], True), ([1.0], [1.005], False), ([1.0], [1.0], False), ([1.0, 1.0], [0.9, 5.0], False),
     ([1.0, 1.0], [1.005, 1.2], True), ([0.0], [0.1], True)],
)  # fmt: skip
def test_the_first_class_that_differs_by_more_than_one_percent_decides(present, new, adopts):
    assert adoption(None, [], present, new)[0] is adopts


def test_what_is_forced_or_helps_who_falls_short_is_adopted_at_any_gain():
    assert adoption("forced: a death", [], [1.0], [0.5])[0]
    assert adoption(None, ["r1"], [1.0], [0.99])[0]
