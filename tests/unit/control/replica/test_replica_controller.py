"""A replica's controller: what it chooses by its model, what it learns, and what it does when that fails."""

from dataclasses import replace

import pytest

from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.control.telemetry import Reading, TelemetryWindow
from pals_ray.models.lookup import tabulated
from pals_ray.models.physics.roofline import RooflineModel
from pals_ray.models.physics.step_cost import GroupPhysics
from pals_ray.models.specs import Parallelism, find_gpu, find_model
from pals_ray.types import ReplicaTelemetry
from tests.support.builders import charge_terms, grant

TERMS = charge_terms(node_gpus=4)
GRANT = grant(charge_w=300.0)
BUSY = ReplicaTelemetry(
    running=32,
    waiting=4,
    running_mean=32.0,
    running_least=32,
    throughput_tokens_per_s=300.0,
    arriving_per_s=3.0,
    output_tokens=100.0,
    power_w=240.0,
)


@pytest.fixture(scope="module")
def model():
    physics = GroupPhysics(find_gpu("A100-SXM"), find_model("Qwen3-32B"), Parallelism(1))
    return tabulated(RooflineModel(physics, time_scale=2.0), 100.0, 400.0, 64, 1)


def choose(controller, now_s=0.0, ceiling_w=300.0, in_force_w=300.0, seen=BUSY, grant=GRANT, may_cap=True):
    return controller.choose(now_s, ceiling_w, in_force_w, TERMS, 32, grant, seen, may_cap=may_cap)


def test_without_a_model_it_goes_as_far_as_the_grant_allows():
    point, reason = choose(ReplicaController(1))
    assert (point.cap_w, point.batch_limit) == (300.0, 32)
    assert "no model" in reason


def test_without_demand_it_rests_and_under_load_it_works(model):
    controller = ReplicaController(1)
    controller.take_model(model, "prior")
    for beat in range(40):
        controller.look(beat / 2, ReplicaTelemetry(power_w=60.0))
        idle, _ = choose(controller, beat / 2, seen=ReplicaTelemetry(power_w=60.0))
    assert idle.cap_w == 100.0
    busy = idle
    for beat in range(40, 160):
        controller.look(beat / 2, BUSY)
        busy, reason = choose(controller, beat / 2, in_force_w=busy.cap_w)
    assert busy.cap_w > 200.0
    assert controller.expected is not None
    assert controller.arrivals.tokens_per_s > 150.0
    assert "tokens/s wanted" in reason


def test_what_arrives_is_told_even_where_the_cap_keeps_the_replica_from_serving_it(model):
    controller = ReplicaController(1)
    controller.take_model(model, "prior")
    held = replace(BUSY, throughput_tokens_per_s=80.0, running=24, waiting=0, arriving_per_s=2.0)
    for beat in range(20):
        controller.look(beat / 2, held)
        choose(controller, beat / 2, ceiling_w=110.0, in_force_w=110.0, seen=held)
    assert controller.arrivals.tokens_per_s == pytest.approx(200.0)
    assert ReplicaController(1).arrivals.per_s == 0.0, "nothing has come yet"


def test_pins_of_a_grant_are_obeyed(model):
    controller = ReplicaController(1)
    controller.take_model(model, "prior")
    pinned = replace(GRANT, pin_cap_w=220.0, pin_batch_limit=8)
    point, _ = choose(controller, ceiling_w=220.0, grant=pinned)
    assert (point.cap_w, point.batch_limit) == (220.0, 8)


def test_where_limits_are_not_ours_to_set_only_the_batch_is_chosen(model):
    controller = ReplicaController(1)
    controller.take_model(model, "prior")
    point, reason = choose(controller, ceiling_w=100.0, in_force_w=400.0, may_cap=False)
    assert point.cap_w == 400.0
    assert point.batch_limit == 32
    assert "no" in reason


def test_it_learns_from_a_point_held_for_as_long_as_telemetry_reaches_back(model):
    controller = ReplicaController(1)
    controller.take_model(model, "prior")
    for beat in range(9):
        choose(controller, beat / 2)
        controller.look(beat / 2, replace(BUSY, throughput_tokens_per_s=100.0))
    assert controller.correction.throughput == 1.0, "the cap has been in force for under 5 s"
    for beat in range(9, 60):
        choose(controller, beat / 2)
        controller.look(beat / 2, replace(BUSY, throughput_tokens_per_s=100.0))
    assert controller.correction.throughput < 0.7


def test_a_new_model_forgets_what_was_learnt_of_another_and_the_same_again_does_not(model):
    controller = ReplicaController(1)
    controller.take_model(model, "prior")
    controller.correction = replace(controller.correction, throughput=1.4)
    controller.take_model(model, "prior")
    assert controller.correction.throughput == 1.4
    controller.take_model(model, "profile x")
    assert controller.correction.throughput == 1.0


def test_natural_draw_is_measured_predicted_under_a_binding_cap_and_never_below_the_recent_p95(model):
    def window(binding, powers_w):
        window = TelemetryWindow()
        joules = 0.0
        for beat, power_w in enumerate(powers_w):
            joules += power_w / 2
            window.add(Reading(beat / 2, None, joules, power_w, binding))
        return window

    def natural_w(controller, seen):
        return controller.natural_draw_w(seen, seen.summary(), 400.0)

    controller = ReplicaController(1)
    calm = window(0.0, [200.0] * 20)
    assert natural_w(controller, calm) == pytest.approx(200.0)
    assert natural_w(controller, window(0.0, [380.0] * 4 + [200.0] * 20)) == 380.0
    assert natural_w(controller, window(1.0, [150.0] * 20)) is None
    controller.take_model(model, "prior")
    assert natural_w(controller, window(1.0, [150.0] * 20)) > 200.0
