"""The guardian: one a node, restarted where it dies, and the limits found at first come back whatever ends the node."""

import os
import signal

import psutil
import pytest
import ray

from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.processes import is_alive
from pals_ray.runtime.node.enrolment import guardian_log
from pals_ray.runtime.node.node_file import read_state
from pals_ray.runtime.stop import StopError, stop_fleet
from tests.support import fleets
from tests.support.fleets import wait_for


def _guardians(fleet):
    return [p for p in fleets.guardians() if p.cmdline()[-1] == fleet.key]


@pytest.fixture
def found(fleet):
    """Limits as an operator left them, different on each GPU."""
    gpus = VirtualDriver.open(fleet.key, fleet.hardware.product, fleet.hardware.count).gpus()
    for gpu, limit_w in zip(gpus, (400, 350, 300.5, 250), strict=True):
        gpu.set_limit_w(limit_w)
    return [400, 350, 300.5, 250]


def test_one_guardian_a_node_restarted_where_killed_and_pals_stop_restores_what_was_found(fleet, found):
    fleet.configure(700)
    one, two = fleet.serve(1, 1)
    assert len(_guardians(fleet)) == 1
    assert list(read_state(fleet.key).found_limit_w.values()) == found
    (process,) = _guardians(fleet)
    assert process.ppid() == 1, "Ray would kill a child of its own"
    process.kill()
    wait_for(lambda: fleet.guardian() is not None and len(_guardians(fleet)) == 1, 10, "nobody starts another", 0.05)
    assert list(read_state(fleet.key).found_limit_w.values()) == found
    for replica in (one, two):
        replica.kill()
    epoch = fleet.status().epoch
    stop_fleet(fleet.manager)
    assert fleet.limits_w() == found
    wait_for(lambda: not _guardians(fleet) and not fleet.files(), 20, "guardian or files stay", 0.05)
    assert "limits restored" in guardian_log(fleet.key).read_text()
    wait_for(lambda: not fleets.actor_processes("GlobalPowerManager"), 5, "the manager stays", 0.05)
    fleet.configure(800)  # starts anew: nothing of before but the epoch
    assert (fleet.status().budget_w, fleet.status().replicas) == (800, ())
    assert fleet.status().epoch > epoch


def test_stopping_brings_back_the_limits_though_the_guardian_has_just_been_killed(fleet, found):
    fleet.configure(700)
    (one,) = fleet.serve(1)
    agent = one.agent_process
    one.kill()
    wait_for(lambda: not is_alive(agent), 5, "its agent stays", 0.02)
    (process,) = _guardians(fleet)
    process.kill()
    stop_fleet(fleet.manager)
    assert fleet.limits_w() == found


def test_stop_says_so_where_replicas_stay_and_a_later_deployment_is_raised_again(fleet, monkeypatch):
    monkeypatch.setattr("pals_ray.runtime.stop.STOP_DEADLINE_S", 1.0)
    fleet.configure(700)
    fleet.serve(1)
    with pytest.raises(StopError, match="replicas have not gone"):
        stop_fleet(fleet.manager)
    assert sum(fleet.limits_w()) <= 700.01
    fleet.configure(600)
    wait_for(lambda: sum(fleet.limits_w()) > 599, 5, "nothing is divided any more", 0.05)


class TestARayletThatIsKilled:
    @pytest.fixture
    def second(self, cluster):
        """A raylet of its own on this machine, which a test may kill."""
        node = cluster.add_node(num_cpus=2, num_gpus=0)
        yield node
        cluster.remove_node(node)

    def _replica(self, fleet, node):
        fleet.configure(900)
        replica = fleet.replica(2, node_id=node.node_id)
        fleet.register(replica)
        replica.claim([gpu.uuid for gpu in fleet.gpus[:2]])
        wait_for(lambda: fleet.limits_w() == [350, 350, 100, 100], 10, "it is not raised", 0.05)
        return replica

    def _kill_raylet(self, node):
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        raylet.kill()
        wait_for(lambda: fleets_gone(raylet), 5, "it survives", 0.02)

    def test_its_limits_come_back_once_raylet_and_replicas_are_gone_and_nothing_stays(self, fleet, found, second):
        replica = self._replica(fleet, second)
        agent = replica.agent_process
        self._kill_raylet(second)
        replica.kill()
        wait_for(lambda: not is_alive(agent), 10, "the agent outlives its raylet", 0.02)
        back_s = wait_for(lambda: fleet.limits_w() == found, 3, "limits were not given back", 0.02)
        print(f"\nlimits back {back_s:.2f} s after the agent")
        wait_for(lambda: not _guardians(fleet) and not fleet.files(), 20, "guardian or files stay", 0.05)

    def test_with_its_guardian_killed_too_the_next_session_still_knows_what_was_found(self, fleet, found, second):
        replica = self._replica(fleet, second)
        agent = replica.agent_process
        # The guardian first, and the agent that would start another held: a crash of the whole node.
        os.kill(agent.pid, signal.SIGSTOP)
        (guardian,) = _guardians(fleet)
        guardian.kill()
        self._kill_raylet(second)
        os.kill(agent.pid, signal.SIGKILL)
        replica.kill()
        assert fleet.limits_w() == [350, 350, 100, 100]
        ray.kill(fleet.manager)
        fleet.configure(800)
        after = fleet.replica(1)
        fleet.register(after)
        assert fleet.limits_w() == [100] * 4
        assert list(read_state(fleet.key).found_limit_w.values()) == found
        after.kill()
        stop_fleet(fleet.manager)
        assert fleet.limits_w() == found


def fleets_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
