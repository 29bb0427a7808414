"""Agents, managers and replicas that die, hang and return: the budget holds at every sample, and all is as before."""

import asyncio
import os
import signal
import time

import pytest
import ray

from pals_ray.processes import is_alive
from pals_ray.runtime.manager.storage import read_state, storage_file
from pals_ray.runtime.messages import MANAGER_NAME, NAMESPACE
from pals_ray.types import Grant
from tests.support import fleets
from tests.support.dummies import DummyFleet
from tests.support.fleets import sampled_limits, wait_for

BUDGET_W = 900


@pytest.fixture(scope="module")
def shared(cluster, tmp_path_factory):
    made = DummyFleet(tmp_path_factory.mktemp("state"))
    yield made
    made.close()


@pytest.fixture
def serving(shared):
    """Two replicas, of one GPU and of two, raised under a budget; the fourth GPU is parked. One fleet, mended."""
    shared.configure(BUDGET_W)
    shared.fleet.set_budget(BUDGET_W)  # the same configuration again keeps what a test has set since
    return shared, *shared.serve(1, 2)


def _grants_w(fleet):
    return {row.replica_id: round(row.grant_w) for row in fleet.status().replicas}


def _sigkill_agent(fleet, replica):
    os.kill(replica.agent_process.pid, signal.SIGKILL)


def _ray_kill_agent(fleet, replica):
    ray.kill(replica.agent)


@pytest.mark.parametrize("kill", [_sigkill_agent, _ray_kill_agent], ids=lambda f: f.__name__.strip("_"))
def test_an_agent_that_died_is_replaced_and_its_gpus_keep_their_cap_meanwhile(serving, kill):
    fleet, _, two = serving
    before, limits_w, agent = _grants_w(fleet), fleet.limits_w(), two.agent_process
    with sampled_limits(fleet.gpus) as samples:
        kill(fleet, two)
        wait_for(lambda: not is_alive(agent), 5, "it survives", 0.02)
        took_s = wait_for(
            lambda: two.agent_process not in (None, agent) and fleet.settled(), 20, "no other agent takes over", 0.1
        )
    print(f"\nreplaced after {took_s:.1f} s")
    assert samples.worst_after(0) <= BUDGET_W + 0.01
    assert min(watts for _, watts in samples.rows) >= sum(limits_w) - 0.01, "caps moved for a dead agent"
    assert (_grants_w(fleet), fleet.limits_w()) == (before, limits_w)
    assert fleet.fleet.set_budget(600).settled_s < 1
    assert sum(fleet.limits_w()) <= 600.01


def _sigkill_manager(fleet):
    (process,) = fleets.actor_processes("GlobalPowerManager")
    process.kill()
    wait_for(lambda: not process.is_running() or process.status() == "zombie", 5, "it survives", 0.02)


def _ray_kill_manager(fleet):
    ray.kill(fleet.manager)
    wait_for(lambda: not fleets.actor_processes("GlobalPowerManager"), 5, "it survives", 0.02)


@pytest.mark.parametrize("kill", [_sigkill_manager, _ray_kill_manager], ids=lambda f: f.__name__.strip("_"))
def test_a_new_manager_takes_up_budget_and_grants_from_disk_and_agents(serving, kill):
    fleet, *_ = serving
    handle = fleet.fleet
    # Cut before: what was written down is more than this budget, and must not keep the next manager from starting.
    fleet.fleet.set_budget(600)
    wait_for(fleet.settled, 5, "the cut budget is not handed out", 0.05)
    before, limits_w, epoch = _grants_w(fleet), fleet.limits_w(), fleet.status().epoch
    with sampled_limits(fleet.gpus) as samples:
        kill(fleet)
        # Nobody but the agents makes another: this looks it up only.
        took_s = wait_for(lambda: _epoch() > epoch and fleet.settled(), 20, "no other manager takes over", 0.1)
    print(f"\nback after {took_s:.1f} s")
    assert samples.worst_after(0) <= 600.01
    assert (_grants_w(fleet), fleet.limits_w()) == (before, limits_w)
    assert handle.status().budget_w == 600, "a handle from before does not find the new manager"
    handle.set_budget(BUDGET_W)
    wait_for(lambda: sum(fleet.limits_w()) > BUDGET_W - 1, 5, "the new manager raises nobody", 0.05)


def _epoch():
    try:
        return ray.get(ray.get_actor(MANAGER_NAME, namespace=NAMESPACE).ping.remote(), timeout=5)
    except (ValueError, ray.exceptions.RayError):
        return 0


def test_a_manager_whose_file_was_lost_takes_its_agents_over_all_the_same(serving):
    fleet, *_ = serving
    limits_w, epoch = fleet.limits_w(), fleet.status().epoch
    with sampled_limits(fleet.gpus) as samples:
        storage_file(str(fleet.storage)).unlink()
        _sigkill_manager(fleet)
        wait_for(lambda: _epoch() > epoch, 10, "no manager without a memory comes up", 0.02)
        fleet.configure(BUDGET_W)  # nothing is left of its configuration either
        wait_for(fleet.settled, 20, "agents and manager do not find together", 0.1)
    assert samples.worst_after(0) <= BUDGET_W + 0.01
    assert fleet.limits_w() == limits_w


def test_manager_and_an_agent_killed_at_once_both_return(serving):
    fleet, one, _ = serving
    before, agent, epoch = _grants_w(fleet), one.agent_process, fleet.status().epoch
    with sampled_limits(fleet.gpus) as samples:
        (manager,) = fleets.actor_processes("GlobalPowerManager")
        os.kill(agent.pid, signal.SIGKILL)
        manager.kill()
        wait_for(
            lambda: _epoch() > epoch and one.agent_process not in (None, agent) and fleet.settled(),
            30,
            "they do not return",
        )
    assert samples.worst_after(0) <= BUDGET_W + 0.01
    assert _grants_w(fleet) == before


def test_a_replica_that_dies_has_its_gpus_parked_at_once_and_leaves_nothing(serving):
    fleet, one, two = serving
    agent = two.agent_process
    assert sum(fleet.limits_w()) == pytest.approx(BUDGET_W, abs=1)
    with sampled_limits(fleet.gpus) as samples:
        two.kill()
        parked_s = wait_for(lambda: fleet.limits_w(two.gpus) == [100, 100], 3, "its GPUs are not parked", 0.005)
        wait_for(lambda: not is_alive(agent), 5, "its agent stays", 0.02)
    print(f"\nparked {parked_s * 1000:.0f} ms after SIGKILL")
    assert parked_s < 0.5
    assert samples.worst_after(0) <= BUDGET_W + 0.01
    assert not two.block.path.exists()
    assert [row.replica_id for row in fleet.status().replicas] == [one.id]
    wait_for(lambda: sorted(fleet.limits_w()) == [100, 100, 100, 400], 5, "what it left is not handed on", 0.05)


def test_a_replica_that_dies_together_with_its_agent_is_forgotten_too(serving):
    fleet, _, two = serving
    agent = two.agent_process
    with sampled_limits(fleet.gpus) as samples:
        os.kill(agent.pid, signal.SIGKILL)
        two.kill()
        wait_for(lambda: sorted(fleet.limits_w()) == [100, 100, 100, 400], 20, "its GPUs are not parked", 0.05)
    assert samples.worst_after(0) <= BUDGET_W + 0.01
    wait_for(lambda: len(fleet.status().replicas) == 1 and not two.block.path.exists(), 5, "something of it stays")


def test_without_a_manager_the_lease_ends_in_the_fail_safe_cap_and_a_manager_brings_the_caps_back(serving):
    fleet, *replicas = serving
    fleet.configure(BUDGET_W, lease_s=1.5, fail_safe_cap_w=150)
    for replica in replicas:
        replica.kill()  # agents that serve already hear of the new lease with their next beats only
    fleet.serve(1, 2)
    before = fleet.limits_w()
    assert sorted(before)[1] > 200
    (manager,) = fleets.actor_processes("GlobalPowerManager")
    with sampled_limits(fleet.gpus) as samples:
        manager.suspend()
        began_s = time.monotonic()
        try:
            wait_for(lambda: sorted(fleet.limits_w()) == [100, 150, 150, 150], 10, "the lease does not end", 0.02)
            ended_s = time.monotonic() - began_s
        finally:
            manager.resume()
        wait_for(lambda: fleet.limits_w() == before, 20, "the caps do not come back", 0.05)
    print(f"\nfail-safe {ended_s:.2f} s after the manager hung, with a lease of 1.5 s")
    assert 0.8 < ended_s < 1.5 + 0.5 + 0.3
    assert samples.worst_after(0) <= BUDGET_W + 0.01


def test_a_late_grant_of_an_older_manager_is_not_obeyed(serving):
    fleet, one, two = serving
    before, epoch = fleet.limits_w(), fleet.status().epoch
    late = Grant(one.id, epoch - 1, 10_000, 400.0, 60.0, "from before")
    report = ray.get(one.agent.apply.remote(late), timeout=5)
    assert report.obeyed[0] == epoch
    assert fleet.limits_w() == before
    assert ray.get(one.agent.apply.remote(Grant(two.id, epoch, 10_000, 400.0, 60.0, "")), timeout=5).obeyed[0] == epoch
    assert fleet.limits_w() == before


def test_a_grant_that_reaches_the_agent_of_a_dead_replica_raises_nothing(serving):
    fleet, _, two = serving
    fleet.fleet.set_budget(400)
    agent, epoch = two.agent, fleet.status().epoch
    grant = Grant(two.id, epoch, 10_000, 800.0, 60.0, "sent while it died")
    with sampled_limits(fleet.gpus) as samples:
        two.kill()
        began_s = time.monotonic()
        while time.monotonic() < began_s + 2:
            try:
                ray.get(agent.apply.remote(grant), timeout=5)
            except ray.exceptions.RayError:
                break
    lowered = [watts for at_s, watts in samples.rows if at_s > began_s + 1.0]
    assert not lowered or lowered[-1] == 400
    assert sum(fleet.limits_w()) == 400


def test_what_a_manager_needs_is_on_disk_before_it_takes_effect(serving):
    fleet, one, two = serving
    kept = read_state(str(fleet.storage))
    assert (kept.budget_w, kept.epoch) == (BUDGET_W, fleet.status().epoch)
    assert set(kept.agents) == {one.id, two.id}
    (node,) = kept.nodes
    bounds_w = [gpu.limit_w for gpu in node.node.gpus]
    assert all(bound_w >= limit_w - 0.01 for bound_w, limit_w in zip(bounds_w, fleet.limits_w(), strict=True))
    fleet.fleet.set_budget(500)
    assert read_state(str(fleet.storage)).budget_w == 500


def test_a_redeploy_with_other_overhead_and_lease_is_obeyed_without_a_rise_above_either_budget(serving):
    fleet, *_ = serving
    with sampled_limits(fleet.gpus) as samples:
        fleet.configure(600, lease_s=3, overhead={"a_w": 40, "b": 0.1})
        assert fleet.status().budget_w == 600
        wait_for(lambda: sum(fleet.limits_w()) * 1.1 + 40 <= 600.01, 5, "the new overhead is not kept", 0.05)
        wait_for(lambda: fleet.status().reserved_w > 590, 10, "what the new budget leaves is not handed out", 0.05)
    assert samples.worst_after(0) <= BUDGET_W + 0.01
    assert sum(fleet.limits_w()) * 1.1 + 40 <= 600.01
    before = fleet.status()
    with pytest.raises(Exception, match="480 W needed"):
        fleet.configure(470, lease_s=4, overhead={"a_w": 40, "b": 0.1})
    assert (fleet.status().budget_w, fleet.status().epoch) == (600, before.epoch)


def test_an_agent_that_hangs_is_ended_and_replaced(serving):
    fleet, _, two = serving
    limits_w, agent = fleet.limits_w(), two.agent_process
    with sampled_limits(fleet.gpus) as samples:
        os.kill(agent.pid, signal.SIGSTOP)
        took_s = wait_for(lambda: not is_alive(agent), 40, "it is left to hang", 0.1)
        wait_for(fleet.settled, 20, "no other agent takes over", 0.1)
    print(f"\nended after {took_s:.1f} s")
    assert samples.worst_after(0) <= BUDGET_W + 0.01
    assert fleet.limits_w() == limits_w


def test_a_policy_that_fails_shows_in_status_and_all_keep_what_they_have(serving):
    fleet, *_ = serving
    limits_w = fleet.limits_w()
    fleet.configure(BUDGET_W, policy="policies.static:allocate")
    wait_for(lambda: any("1200 W" in note and "static" in note for note in fleet.status().notes), 5, "no note", 0.05)
    assert fleet.limits_w() == limits_w
    fleet.configure(BUDGET_W)
    wait_for(lambda: not any("static" in note for note in fleet.status().notes), 5, "the note stays", 0.05)


def test_another_policy_reaches_the_block_with_its_pinned_batch_limit(serving):
    fleet, one, two = serving
    fleet.configure(BUDGET_W, policy="tests.support.pinned_policy:allocate")
    for replica in (one, two):
        wait_for(lambda r=replica: r.block.field("batch_limit")[0] == 4, 5, "the batch limit is not pinned", 0.02)
    wait_for(lambda: {row.batch_limit for row in fleet.status().replicas} == {4}, 3, "status does not say so", 0.05)
    fleet.configure(BUDGET_W)
    wait_for(lambda: one.block.field("batch_limit")[0] == 32, 5, "the pin is not lifted", 0.02)


def test_an_engine_is_refused_where_the_node_has_no_free_gpu_left(serving):
    fleet, one, two = serving
    wants = fleet.replica(2)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(_register(wants), 3))
    assert {row.replica_id for row in fleet.status().replicas} == {one.id, two.id}
    two.kill()
    fleet.register(wants)
    assert fleet.of(wants).state == "starting"


async def _register(replica):
    from pals_ray.runtime.actors import ensure_agent

    await ensure_agent(replica.spec)
