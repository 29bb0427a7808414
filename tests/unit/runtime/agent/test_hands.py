"""An agent's hands on virtual GPUs: grants, leases and a controller that fails."""

import uuid
from dataclasses import replace

import pytest

from pals_ray.control.ledger.charge import ChargeTerms
from pals_ray.control.messages import Reply
from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.control.snapshot import Overhead
from pals_ray.control.telemetry import TelemetryWindow
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.gpus.virtual_block import remove_block
from pals_ray.runtime.agent.devices import Devices
from pals_ray.runtime.agent.hands import Hands
from pals_ray.runtime.messages import Answer, NodeGpu
from pals_ray.types import Grant, Target

TERMS = ChargeTerms(Overhead(), 2, 100.0, 400.0, (0.0, 0.0))
GRANT = Grant("r", 3, 1, 500.0, 60.0, "a share")


class Broken:
    """A model that cannot answer."""

    def predict(self, cap_w, batch):
        raise FloatingPointError("no such model")


@pytest.fixture
def gpus():
    key = f"test-{uuid.uuid4().hex[:12]}"
    yield VirtualDriver.open(key, "A100-SXM", 2).gpus()
    remove_block(key)


@pytest.fixture
async def hands(gpus):
    devices = Devices(VirtualDriver.attach(gpus[0].uuid.removeprefix("GPU-virtual-").removesuffix("-0")))
    made = Hands("r", devices, ReplicaController(2), TelemetryWindow())
    made.managed = {gpu.uuid: NodeGpu(gpu.info, 400.0, 0.0, True, ()) for gpu in gpus}
    await made.take_hold([gpu.uuid for gpu in gpus], 32, None)
    yield made
    devices.close()


def answer(grant=GRANT, epoch=3, fail_safe_w=None):
    return Answer(Reply(epoch, 7, grant, (), TERMS, None, "noted"), fail_safe_w, Target(priority=4))


def limits_w(gpus):
    return [gpu.limit_w() for gpu in gpus]


async def test_a_grant_is_in_force_when_it_has_been_obeyed_and_a_cut_acts_at_once(hands, gpus):
    await hands.obey(answer())
    assert limits_w(gpus) == [250, 250]
    assert hands.batch_limit == 32
    await hands.take_grant(replace(GRANT, seq=2, charge_w=300.0))
    assert limits_w(gpus) == [150, 150]
    assert (await hands.report()).obeyed == (3, 2)


async def test_what_is_late_or_from_an_older_manager_changes_nothing(hands, gpus):
    await hands.obey(answer())
    await hands.take_grant(replace(GRANT, seq=0, charge_w=800.0))
    await hands.obey(answer(replace(GRANT, epoch=2, seq=9, charge_w=800.0), epoch=2))
    assert limits_w(gpus) == [250, 250]


async def test_where_no_point_can_be_chosen_caps_go_down_with_the_ceiling_and_never_up(hands, gpus):
    await hands.obey(answer())
    hands._pilot.take_model(Broken(), "broken")
    await hands.take_grant(replace(GRANT, seq=2, charge_w=300.0))
    assert limits_w(gpus) == [150, 150]
    assert "no such model" in hands.reason
    await hands.take_grant(replace(GRANT, seq=3, charge_w=700.0))
    assert limits_w(gpus) == [150, 150]


async def test_a_lease_that_ended_means_the_fail_safe_cap_until_a_newer_grant(hands, gpus):
    await hands.obey(answer(replace(GRANT, lease_s=1e-9), fail_safe_w=180.0))
    await hands.hold_point()
    assert limits_w(gpus) == [180, 180]
    assert "lease" in hands.reason
    assert (await hands.report()).expired
    await hands.take_grant(replace(GRANT))
    assert limits_w(gpus) == [180, 180], "a renewal of an ended lease raised a cap"
    await hands.take_grant(replace(GRANT, seq=2))
    assert limits_w(gpus) == [250, 250]


async def test_limits_that_are_not_ours_to_set_stay_and_the_batch_is_ordered_all_the_same(hands, gpus):
    hands.managed = {name: replace(gpu, may_set=False) for name, gpu in hands.managed.items()}
    await hands.obey(answer(replace(GRANT, pin_batch_limit=8)))
    assert limits_w(gpus) == [400, 400]
    assert hands.batch_limit == 8


async def test_once_let_go_the_gpus_are_down_and_no_grant_raises_them(hands, gpus):
    await hands.obey(answer())
    await hands.let_go()
    await hands.take_grant(replace(GRANT, seq=5, charge_w=800.0))
    assert limits_w(gpus) == [100, 100]
