"""Processes of others on GPUs of a node: reported, and never touched."""

import subprocess

import pytest

from pals_ray.gpus.virtual import VirtualDriver
from tests.support.fleets import wait_for


@pytest.fixture
def foreign():
    """A process that no raylet has started."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_a_gpu_that_a_process_of_others_holds_is_reported_and_never_touched(fleet, foreign):
    driver = VirtualDriver.open(fleet.key, fleet.hardware.product, fleet.hardware.count)
    theirs = driver.claim_lowest_free(foreign.pid)
    fleet.configure(700)
    replica = fleet.replica(2)
    fleet.register(replica)
    assert fleet.limits_w() == [400, 100, 100, 100]
    replica.claim([fleet.gpus[1].uuid, fleet.gpus[2].uuid])
    wait_for(lambda: fleet.limits_w() == [400, 300, 300, 100], 10, "it is not raised", 0.02)
    wait_for(lambda: fleet.status().unmanaged_w > 0, 3, "the draw of others is not shown", 0.05)
    status = fleet.status()
    assert theirs.uuid not in {gpu.uuid for gpu in status.gpus}
    assert status.unmanaged_w == pytest.approx(theirs.power_w())
    second = fleet.replica(1)
    fleet.register(second)
    with pytest.raises(Exception, match="managed GPUs"):
        second.claim([theirs.uuid])
    assert theirs.limit_w() == 400


def test_a_process_of_others_on_a_parked_gpu_stops_no_agent_that_starts_later(fleet, foreign):
    fleet.configure(900)
    first, second = fleet.replica(), fleet.replica()
    fleet.register(first)
    first.claim([fleet.gpus[0].uuid])
    driver = VirtualDriver.attach(fleet.key)
    held = [driver.claim_lowest_free(foreign.pid) for _ in range(4)]
    for gpu in held[:3]:
        gpu.release(foreign.pid)
    fleet.register(second)
    second.claim([fleet.gpus[1].uuid])
    first.kill()  # now the second agent parks, by an order that names the GPU which it takes for unmanaged
    wait_for(lambda: fleet.limits_w() == [100, 400, 100, 100], 10, "the second does not rise", 0.05)
    assert fleet.of(second).state == "serving"
    fleet.fleet.set_budget(450)
    assert sum(fleet.limits_w()) <= 450.01
