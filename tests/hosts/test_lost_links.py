"""Links that are slow or cut, and a head that restarts: the budget holds, and the fleet re-forms by itself."""

import time

import pytest

from pals_ray.runtime.node.node_file import node_key
from tests.hosts import network
from tests.hosts.cluster import HostCluster
from tests.hosts.fleet import (
    BUDGETS_W,
    FAIL_SAFE_W,
    LEASE_S,
    LOW_W,
    MODELS,
    OVERHEAD,
    bring_up,
    loaded,
    look_on,
    sampled,
)
from tests.support import fleets
from tests.support.fleets import wait_for

pytestmark = [
    pytest.mark.skipif(network.missing() is not None, reason=str(network.missing())),
    pytest.mark.timeout(600),
    pytest.mark.minutes,
]


@pytest.fixture(scope="module")
def cluster():
    assert not fleets.engine_processes(), "vLLM engines are running already; this machine holds one fleet at a time"
    with HostCluster() as made:
        bring_up(made, dict(zip(MODELS, made.workers, strict=True)))
        yield made


def recovered(cluster, places):
    """Whether the same replicas serve again where they were, and answer."""
    return cluster.places() == places and all(cluster.answers(model) for model in MODELS)


def test_a_slow_lossy_link_loses_neither_the_budget_nor_a_replica(cluster):
    places = cluster.places()
    with loaded(cluster), sampled(cluster) as sampler, cluster.handle_on_head() as set_budget:
        cluster.workers[0].slow(delay_s=0.2, loss=0.05)
        try:
            time.sleep(20)
            set_budget(LOW_W)
            kept_s = time.monotonic()
            time.sleep(5)
            back = set_budget(BUDGETS_W["fleet"])
        finally:
            cluster.workers[0].heal()
        took_s = wait_for(lambda: recovered(cluster, places), 90, "the fleet does not re-form")
    print(f"\n200 ms and 5 % loss: all serve {took_s:.1f} s after the link was mended; {sampler.report(BUDGETS_W)}")
    assert sampler.within(BUDGETS_W)
    assert sampler.within({"fleet": LOW_W}, kept_s, back.called_s)


def test_a_link_cut_for_30_s_ends_in_the_fail_safe_cap_stays_charged_and_heals_by_itself(cluster):
    places, cut_off = cluster.places(), cluster.workers[1]
    (name,) = [replica for replica, address in places.items() if address == cut_off.address]

    def row():
        (found,) = [row for row in cluster.status()["replicas"] if row["replica_id"] == name]
        return found

    with loaded(cluster), sampled(cluster) as sampler:
        held = row()["gpus"]
        numbers = [int(uuid.rpartition("-")[2]) for uuid in held]
        key = node_key(cut_off.address)
        wait_for(
            lambda: min(sampler.gpu_limits_w(key)[n] for n in numbers) > FAIL_SAFE_W + 10, 60, "the caps are not up"
        )
        cut_off.cut()
        cut_s = time.monotonic()
        try:
            fail_safe_s = wait_for(
                lambda: all(sampler.gpu_limits_w(key)[n] <= FAIL_SAFE_W + 0.01 for n in numbers),
                LEASE_S + 3,
                "the lease does not end in the fail-safe cap",
                0.02,
            )
            wait_for(lambda: row()["state"] == "silent", 10, "nobody notices that it is silent")
            charged_w = row()["charge_w"]
            wait_for(
                lambda: any("cannot be reached" in note for note in cluster.status()["notes"]), 10, "no note says so"
            )
            while time.monotonic() < cut_s + 30:
                assert row()["charge_w"] == charged_w, "what is cut off is no longer charged as it was"
                time.sleep(1)
        finally:
            cut_off.heal()
        took_s = wait_for(lambda: recovered(cluster, places), 120, "the fleet does not re-form")
        raised_s = wait_for(
            lambda: min(sampler.gpu_limits_w(key)[n] for n in numbers) > FAIL_SAFE_W + 10, 60, "it is not raised again"
        )
        look_on(sampler, time.monotonic(), 20)  # Serve stops what it gave up only at its next look
        assert recovered(cluster, places), "Serve gave up a replica that only could not be reached"
    print(
        f"\nlink cut for 30 s: at the fail-safe cap after {fail_safe_s:.1f} s, charged {charged_w:.0f} W all along; "
        f"mended, all serve after {took_s:.1f} s and it is raised again {raised_s:.1f} s later; "
        f"{sampler.report(BUDGETS_W)}"
    )
    least_w = len(held) * FAIL_SAFE_W * (1 + OVERHEAD["b"])
    assert charged_w > least_w
    assert sampler.within(BUDGETS_W)


def test_a_head_that_restarts_finds_its_workers_serving(cluster):
    places = cluster.places()
    with sampled(cluster) as sampler:
        cluster.head.power_off()
        off_s = time.monotonic()
        cluster.head.boot()
        cluster.step("ray up")
        up_s = time.monotonic() - off_s
        wait_for(lambda: recovered(cluster, places), 150, "the fleet does not re-form around its new head")
        took_s = time.monotonic() - off_s
    print(f"\nhead lost and up again after {up_s:.1f} s, all serve after {took_s:.1f} s; {sampler.report(BUDGETS_W)}")
    assert sampler.within(BUDGETS_W)
    assert cluster.status()["budget_w"] == BUDGETS_W["fleet"]
