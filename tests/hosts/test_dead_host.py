"""A host that loses its power: its replicas are placed elsewhere, and stay inside the budget while it is charged."""

import time

import pytest

from pals_ray.runtime.node.node_file import node_key
from tests.hosts import network
from tests.hosts.cluster import HostCluster, boot_anew
from tests.hosts.fleet import BUDGETS_W, FAIL_SAFE_W, bring_up, loaded, sampled, serves
from tests.support import fleets
from tests.support.fleets import wait_for

pytestmark = [
    pytest.mark.skipif(network.missing() is not None, reason=str(network.missing())),
    pytest.mark.timeout(600),
    pytest.mark.minutes,
]


@pytest.fixture
def cluster():
    assert not fleets.engine_processes(), "vLLM engines are running already; this machine holds one fleet at a time"
    with HostCluster() as made:
        bring_up(made, {})
        yield made


def test_a_host_that_dies_has_its_replicas_placed_elsewhere_inside_the_budget(cluster):
    places = cluster.places()
    dead = next(worker for worker in cluster.workers if worker.address in places.values())
    (other,) = (worker for worker in cluster.workers if worker is not dead)
    charged_w = cluster.status()["reserved_w"]
    with loaded(cluster, 4), sampled(cluster) as sampler:
        wait_for(lambda: max(sampler.gpu_limits_w(node_key(dead.address))) > FAIL_SAFE_W, 60, "no cap is up")
        dead.power_off()
        off_s = time.monotonic()
        wait_for(
            lambda: set(cluster.places().values()) == {other.address} and serves(cluster),
            300,
            "its replicas are not placed elsewhere",
            1,
        )
        took_s = time.monotonic() - off_s
        status = cluster.status()
    print(
        f"\na host died with {len(places)} replicas: all serve on the other {took_s:.1f} s later. Reserved are "
        f"{status['reserved_w']:.0f} W, the dead host's among them ({charged_w:.0f} W before); "
        f"{sampler.report(BUDGETS_W)}"
    )
    assert sampler.within(BUDGETS_W)
    assert any("cannot be reached" in note for note in status["notes"])
    boot_anew(dead)
    mine = f"GPU-virtual-{node_key(other.address)}"
    released_s = wait_for(
        lambda: {gpu["uuid"].rpartition("-")[0] for gpu in cluster.status()["gpus"]} == {mine},
        60,
        "the host that came back without Ray is charged what it had before it died",
    )
    left_w = cluster.status()["reserved_w"]
    print(f"booted again: its charge is free {released_s:.1f} s later, {left_w:.0f} W are reserved")
