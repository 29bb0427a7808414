"""Measurement holds on a real cluster: real manager and agents, replicas that only sleep."""

import pytest
import ray

from pals_ray.control.allocation.measurement_holds import HOLD_LEASE_S, HoldRefused
from pals_ray.types import OperatingPoint, Provenance
from tests.support.dummies import MAX_BATCH, DummyFleet
from tests.support.fleets import sampled_limits, wait_for

BUDGET_W = 900


def call(method, *arguments):
    try:
        return ray.get(method.remote(*arguments), timeout=10)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


@pytest.fixture(scope="module")
def serving(cluster, tmp_path_factory):
    made = DummyFleet(tmp_path_factory.mktemp("state"))
    made.configure(BUDGET_W)
    yield made
    made.close()


def test_a_held_replica_is_at_its_point_until_its_profiler_falls_silent_and_the_budget_holds_throughout(serving):
    one, two = serving.serve(1, 2)
    batch_limit = one.block.field("batch_limit")
    with sampled_limits(serving.gpus) as samples:
        for cap_w, batch, rest_w in ((400.0, 4, 200.0), (150.0, 8, 325.0)):
            call(serving.manager.hold, one.id, "me", OperatingPoint(cap_w, batch))
            wait_for(
                lambda cap=cap_w, batch=batch: serving.limits_w(one.gpus) == [cap] and batch_limit[0] == batch,
                3,
                f"{cap_w} W, batch limit {batch} are not in force",
                0.02,
            )
            wait_for(lambda w=rest_w: serving.limits_w(two.gpus) == [w] * 2, 3, "the others have not the rest", 0.02)
            assert "held at" in serving.of(one).grant_reason
        silent_s = wait_for(lambda: batch_limit[0] == MAX_BATCH, 10, "the batch limit is not restored", 0.02)
        wait_for(
            lambda: serving.limits_w(one.gpus + two.gpus) == pytest.approx([800 / 3] * 3, abs=0.01),
            3,
            "the caps are not restored",
            0.02,
        )
    assert HOLD_LEASE_S - 1.5 < silent_s < HOLD_LEASE_S + 2
    assert samples.worst_after(0) <= BUDGET_W + 0.01


def test_what_a_profiler_may_measure_is_said_and_what_it_may_not_is_refused(serving):
    serving.fleet.set_budget(700)
    (one,) = serving.serve(1)
    subject = call(serving.manager.subject, "dummy")
    assert (subject.replica.replica_id, subject.deployed.known_as, subject.replica.num_gpus) == (one.id, "dummy", 1)
    assert (subject.replica.min_limit_w, subject.most_cap_w, subject.replica.max_batch) == (100, 400, MAX_BATCH)
    assert (subject.time_scale, subject.gpu.provenance) == (2.0, Provenance.MODELLED)
    serving.fleet.set_budget(550)
    assert call(serving.manager.subject, "dummy").most_cap_w == 250
    for point, says in (
        (OperatingPoint(300.0, 4), "50 W more are needed"),
        (OperatingPoint(90.0, 4), "100 to 400 W"),
        (OperatingPoint(200.0, MAX_BATCH + 1), "1 to 32 sequences"),
    ):
        with pytest.raises(HoldRefused, match=says):
            call(serving.manager.hold, one.id, "me", point)
    with pytest.raises(HoldRefused, match="possible are dummy"):
        call(serving.manager.subject, "smart")
    serving.serve(1, 1)
    with pytest.raises(HoldRefused, match="scale the model to one replica"):
        call(serving.manager.subject, "dummy")
