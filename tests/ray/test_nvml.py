"""The same on NVML: nvidia-ml-py's real ctypes path to a fake library with four H100s (200 to 700 W)."""

import subprocess

import pytest

from pals_ray.gpus.driver_choice import HardwareSpec
from pals_ray.runtime.stop import stop_fleet
from tests.support.dummies import DummyFleet
from tests.support.fleets import wait_for


@pytest.fixture
def h100s(nvml):
    """Four GPUs as they come from the factory."""
    for index, gpu in enumerate(nvml.gpus):
        nvml._make_h100(gpu, index)
        gpu.num_pids = gpu.out_of_band_mw = gpu.lost = gpu.set_calls = 0
    return nvml.gpus


@pytest.fixture
def fleet(cluster, h100s, tmp_path):
    made = DummyFleet(tmp_path / "state", HardwareSpec("nvml"))
    yield made
    made.close()


def _uuids(h100s):
    return [gpu.uuid.decode() for gpu in h100s]


def _limits_w(h100s):
    return [gpu.limit_mw / 1000 for gpu in h100s]


def test_two_replicas_on_four_gpus_under_one_budget_and_the_limits_come_back(fleet, h100s):
    fleet.configure(1600)
    one, two = fleet.replica(1), fleet.replica(2)
    fleet.register(one, two)
    assert _limits_w(h100s) == [200] * 4
    uuids = _uuids(h100s)
    one.claim(uuids[:1])
    two.claim(uuids[1:3])
    wait_for(lambda: _limits_w(h100s) == pytest.approx([466.666] * 3 + [200], abs=0.01), 10, "not raised", 0.02)
    fleet.fleet.set_budget(900)
    assert sum(_limits_w(h100s)) <= 900
    wait_for(lambda: fleet.status().measured_w > 4 * 72, 3, "no draw is shown", 0.05)
    status = fleet.status()
    assert (status.provenance, status.time_scale, status.enforced) == ("measured", None, True)
    assert {gpu.product for gpu in status.gpus} == {"NVIDIA H100 80GB HBM3"}
    for replica in (one, two):
        replica.kill()
    stop_fleet(fleet.manager)
    assert _limits_w(h100s) == [700] * 4


def test_without_permission_a_budget_under_the_limits_in_force_refuses_the_start_with_ways_out_and_watts(fleet, h100s):
    for gpu in h100s:
        gpu.permission = 0
    fleet.configure(1600)
    with pytest.raises(Exception, match="2800 W needed") as refused:
        fleet.register(fleet.replica(2))
    for way_out in ("run as root", "CAP_SYS_ADMIN", "zeusd", "allow_unenforced: true"):
        assert way_out in str(refused.value)
    assert fleet.status().replicas == ()
    assert _limits_w(h100s) == [700] * 4


def test_without_permission_it_runs_unenforced_where_that_is_allowed_and_says_so(fleet, h100s):
    for gpu in h100s:
        gpu.permission = 0
    fleet.configure(1600, hardware={"kind": "nvml", "allow_unenforced": True})
    replica = fleet.replica(2)
    fleet.register(replica)
    replica.claim(_uuids(h100s)[:2])
    status = fleet.status()
    assert not status.enforced
    assert any("UNENFORCED" in note and "2800 W of 1600 W" in note for note in status.notes)
    assert status.charge_w == 2800
    assert not any(gpu.enforceable for gpu in status.gpus)
    wait_for(lambda: replica.block.field("batch_limit")[0] > 0, 3, "the batch limit is not set", 0.05)
    assert _limits_w(h100s) == [700] * 4
    assert sum(gpu.set_calls for gpu in h100s) == 4, "more than one try whether it is permitted"


def test_without_permission_a_budget_above_the_limits_in_force_is_kept_by_them(fleet, h100s):
    for gpu in h100s:
        gpu.permission = 0
    fleet.configure(3000)
    replica = fleet.replica(2)
    fleet.register(replica)
    replica.claim(_uuids(h100s)[:2])
    assert fleet.status().charge_w == 2800
    with pytest.raises(Exception, match="2800 W needed"):
        fleet.fleet.set_budget(2000)
    assert fleet.status().budget_w == 3000


def test_a_gpu_with_a_process_of_others_is_unmanaged_and_untouched(fleet, h100s):
    foreign = subprocess.Popen(["sleep", "600"])
    try:
        h100s[2].num_pids, h100s[2].pids[0] = 1, foreign.pid
        fleet.configure(1600)
        replica = fleet.replica(2)
        fleet.register(replica)
        uuids = _uuids(h100s)
        replica.claim(uuids[:2])
        wait_for(lambda: _limits_w(h100s) == [700, 700, 700, 200], 10, "it is not raised", 0.02)
        assert h100s[2].set_calls == 0
        assert uuids[2] not in {gpu.uuid for gpu in fleet.status().gpus}
        wait_for(lambda: fleet.status().unmanaged_w > 0, 3, "its draw is not shown", 0.05)
    finally:
        foreign.kill()
        foreign.wait()
