import os
import signal
import subprocess
import threading
import uuid
from dataclasses import replace

import pytest

from pals_ray.engine.control_block import BLOCK_VARIABLE, ControlBlock, block_path
from pals_ray.gpus.driver_choice import HardwareSpec
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.gpus.virtual_block import remove_block
from pals_ray.processes import identify
from pals_ray.runtime.node import enrolment, guardian
from pals_ray.runtime.node import node_file as node
from pals_ray.runtime.node.enrolment import enrol, order_stop
from pals_ray.runtime.node.node_file import GuardianError, NodeState, node_key, read_state, state_path, update_state
from pals_ray.runtime.node.ownership import is_ours, kill_engines, visible_gpus

HARDWARE = HardwareSpec("virtual", "A100-SXM", 2)
FOUND_W = [350.0, 250.5]


@pytest.fixture
def key():
    made = f"test-{uuid.uuid4().hex[:12]}"
    yield made
    update_state(made, lambda _: None)
    remove_block(made)


@pytest.fixture
def gpus(key):
    made = VirtualDriver.open(key, HARDWARE.product, HARDWARE.count).gpus()
    for gpu, limit_w in zip(made, FOUND_W, strict=True):
        gpu.set_limit_w(limit_w)
    return made


@pytest.fixture
def processes():
    """Processes that sleep, for agents, raylets and replicas: `processes()` starts one."""
    started = []

    def start():
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def no_guardian(monkeypatch):
    """This process stands for the guardian that would be started."""
    monkeypatch.setattr(enrolment, "_start_guardian", lambda key: update_state(key, guardian._enter))


def _look(gpus):
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    return lambda uuid: (by_uuid[uuid].ordered_limit_w(), by_uuid[uuid].may_set_limit())


def _enrol(key, gpus, raylet, **kwargs):
    return enrol(key, HARDWARE, raylet, [gpu.uuid for gpu in gpus], _look(gpus), **kwargs)


def _end(process):
    process.kill()
    process.wait()


def _found(state):
    return list(state.found_limit_w.values())


def test_a_state_is_read_back_as_it_was_written(key):
    state = NodeState(key, HARDWARE, identify(), {"GPU-0": 400.5}, {"GPU-0": True}, (identify(),), identify(), True)
    update_state(key, lambda _: state)
    assert read_state(key) == state
    assert update_state(key, lambda _: None) is None
    assert read_state(key) is None
    assert not list(node.SHARED_MEMORY.glob(f"*{key}*"))


def test_changes_at_once_all_count(key):
    update_state(key, lambda _: NodeState(key, HARDWARE, identify()))

    def add(name):
        update_state(key, lambda s: replace(s, found_limit_w={**s.found_limit_w, name: 1.0}))

    threads = [threading.Thread(target=add, args=(f"GPU-{i}",)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_state(key).found_limit_w) == 20


def test_a_lock_that_is_never_free_is_named(key, monkeypatch):
    monkeypatch.setattr(node, "LOCK_TIMEOUT_S", 0.1)
    with node.FileLock(node._lock_path(key)), pytest.raises(GuardianError, match=r"\.lock was not free"):
        threading_result(lambda: update_state(key, lambda s: s))


def threading_result(call):
    """Call in another thread, since a file lock may be taken again by its own; raise what it raised."""
    caught = []

    def run():
        try:
            call()
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]


def test_the_first_agent_notes_the_limits_found_and_a_later_one_takes_no_cap_of_ours_for_them(
    key, gpus, no_guardian, processes
):
    state = _enrol(key, gpus, identify())
    assert _found(state) == FOUND_W
    assert set(state.may_set.values()) == {True}
    gpus[0].set_limit_w(100)
    assert _found(_enrol(key, gpus, identify())) == FOUND_W


def test_while_another_agent_lives_nobody_tries_whether_its_limits_may_be_set(key, gpus, no_guardian, processes):
    other = identify(processes().pid)
    _enrol(key, gpus, identify())
    update_state(key, lambda s: replace(s, agents=(other,)))
    orders = [gpu._cap.version() for gpu in gpus]
    state = _enrol(key, gpus, identify())
    assert [gpu._cap.version() for gpu in gpus] == orders
    assert state.agents == (other, identify())


def test_permission_is_asked_anew_where_the_agents_before_are_dead(key, gpus, no_guardian, processes):
    _enrol(key, gpus, identify())
    gone = processes()
    dead = identify(gone.pid)
    _end(gone)
    update_state(key, lambda s: replace(s, agents=(dead,)))
    gpus[1].permitted = False
    assert list(_enrol(key, gpus, identify()).may_set.values()) == [True, False]


def test_an_agent_waits_for_a_stop_under_way_and_says_so_where_it_does_not_end(key, gpus, no_guardian):
    _enrol(key, gpus, identify())
    order_stop(key)
    with pytest.raises(GuardianError, match="an earlier stop has not finished"):
        _enrol(key, gpus, identify(), deadline_s=0.3)


def test_a_guardian_that_does_not_start_is_an_error_that_names_its_log(key, gpus, monkeypatch):
    monkeypatch.setattr(enrolment.sys, "executable", "/bin/false")
    with pytest.raises(GuardianError, match=f"pals-guardian-{key}"):
        _enrol(key, gpus, identify())


def test_ordering_a_stop_where_nothing_is_ours_leaves_no_file(key):
    order_stop(key)
    assert not list(node.SHARED_MEMORY.glob(f"*{key}*"))


class TestGuardian:
    @pytest.fixture
    def raylet(self, processes):
        return processes()

    @pytest.fixture
    def state(self, key, gpus, no_guardian, raylet, processes):
        """A node whose GPUs are capped, with an agent, and this process as its guardian."""
        _enrol(key, gpus, identify(raylet.pid))
        self.agent = processes()
        update_state(key, lambda s: replace(s, agents=(identify(self.agent.pid),)))
        for gpu in gpus:
            gpu.set_limit_w(100)
        return read_state(key)

    def _limits_w(self, gpus):
        return [gpu.limit_w() for gpu in gpus]

    def test_it_stays_while_raylet_or_agents_live(self, key, gpus, state, raylet):
        assert not guardian._is_due(state)
        _end(raylet)
        assert not guardian._is_due(state)
        assert update_state(key, guardian._give_back) == state
        assert self._limits_w(gpus) == [100, 100]

    def test_it_stays_while_an_engine_of_ours_lives(self, key, gpus, state, raylet, processes):
        engine = processes()
        block = ControlBlock.create(block_path(key, "r"))
        block.field("engine_pid")[0], block.field("engine_start_ticks")[0] = identify(engine.pid)
        _end(raylet)
        _end(self.agent)
        assert not guardian._is_due(state)
        _end(engine)
        assert guardian._is_due(state)
        block.unlink()

    def test_it_kills_an_engine_that_has_no_scheduler_yet_to_see_its_parent_die(self, key, gpus, state, raylet):
        engines = [_engine(key, name) for name in ("r1", "r2")]
        _end(self.agent)
        assert not guardian._is_due(state)
        assert [engine.poll() for engine in engines] == [None, None], "killed while the raylet lives"
        _end(raylet)
        guardian.watch(key)
        assert [engine.wait(5) for engine in engines] == [-signal.SIGKILL] * 2
        assert self._limits_w(gpus) == FOUND_W

    @pytest.mark.parametrize("ended_by", ["raylet", "stop"])
    def test_it_restores_what_was_found_and_removes_every_file(self, key, gpus, state, raylet, ended_by, processes):
        replica = processes()
        block = ControlBlock.create(block_path(key, "r"))
        block.field("owner_pid")[0], block.field("owner_start_ticks")[0] = identify(replica.pid)
        _end(self.agent)
        if ended_by == "raylet":
            _end(raylet)
        else:
            order_stop(key)
        threading.Timer(0.5, _end, (replica,)).start()
        guardian.watch(key)
        assert self._limits_w(gpus) == FOUND_W
        assert not [p for p in node.SHARED_MEMORY.glob(f"*{key}*") if "virtual" not in p.name]

    def test_it_tries_again_until_every_limit_is_back(self, key, gpus, state, raylet, monkeypatch):
        monkeypatch.setattr(guardian, "RETRY_S", 0.05)
        gpus[0].failing_sets = 3
        _end(raylet)
        _end(self.agent)
        guardian.watch(key)
        assert self._limits_w(gpus) == FOUND_W

    def test_a_driver_that_does_not_open_does_not_end_it(self, key, gpus, state, raylet, monkeypatch):
        monkeypatch.setattr(guardian, "RETRY_S", 0.05)
        opened = []

        def open_at_the_third(self, node_key):
            opened.append(node_key)
            if len(opened) < 3:
                raise guardian.GpuError("the driver is being replaced")
            return VirtualDriver.attach(node_key)

        monkeypatch.setattr(HardwareSpec, "open", open_at_the_third)
        _end(raylet)
        _end(self.agent)
        guardian.watch(key)
        assert self._limits_w(gpus) == FOUND_W

    def test_a_lost_gpu_keeps_it_from_nothing(self, key, gpus, state, raylet):
        gpus[0].lost = True
        _end(raylet)
        _end(self.agent)
        guardian.watch(key)
        gpus[0].lost = False
        assert self._limits_w(gpus) == [100, FOUND_W[1]]

    def test_an_agent_of_a_new_raylet_that_enrols_keeps_the_node(self, key, gpus, state, raylet):
        _end(raylet)
        _end(self.agent)
        assert guardian._is_due(state)
        _enrol(key, gpus, identify())
        assert update_state(key, guardian._give_back) is not None
        assert self._limits_w(gpus) == [100, 100]
        assert _found(read_state(key)) == FOUND_W

    def test_another_guardian_in_the_file_ends_this_one(self, key, gpus, state, processes):
        update_state(key, lambda s: replace(s, guardian=identify(processes().pid)))
        guardian.watch(key)
        assert self._limits_w(gpus) == [100, 100]

    def test_a_living_guardian_is_not_replaced(self, key, state):
        assert guardian._enter(state).guardian == identify()
        assert guardian._enter(None) is None


def _engine(key, name):
    """A process with the environment of an engine's."""
    environment = {**os.environ, BLOCK_VARIABLE: str(block_path(key, name))}
    return subprocess.Popen(["sleep", "60"], env=environment)


def test_a_dead_replicas_engine_is_killed_and_no_other(key, processes):
    dead, other, without = _engine(key, "r1"), _engine(key, "r2"), processes()
    assert kill_engines(str(block_path(key, "r1"))) == 1
    assert dead.wait(5) == -signal.SIGKILL
    assert (other.poll(), without.poll()) == (None, None)
    _end(other)


def test_a_node_key_is_fit_for_a_file_name():
    assert node_key("10.0.0.1") == "10-0-0-1"
    assert node_key("fe80::1%eth0") == "fe80__1_eth0"


def test_no_node_key_is_the_beginning_of_another_with_more_of_a_file_name():
    keys = [node_key(address) for address in ("10.0.0.1", "10.0.0.11", "fe80::1", "fe80::1:2", "fe80::1%eth0")]
    assert not [(a, b) for a in keys for b in keys if b.startswith(f"{a}-")]
    assert state_path("10-0-0-1").name == "pals-node-10-0-0-1.json"


def test_ours_is_what_the_raylet_started(processes):
    me, child = identify(), processes()
    assert is_ours(me.pid, me)
    assert is_ours(child.pid, me)
    assert not is_ours(os.getppid(), me)
    assert is_ours(2**22 - 1, me), "a process that has gone holds nothing"


@pytest.mark.parametrize(
    ("variable", "seen"),
    [(None, "abcd"), ("0,2", "ac"), ("GPU-b", "b"), ("", ""), ("-1", ""), ("9", ""), ("NoDevFiles", "")],
)
def test_visible_are_the_gpus_that_the_raylet_may_give_out(variable, seen):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": variable} if variable is not None else dict(os.environ)
    if variable is None:
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    # Its line of output says that it runs, and is the last thing that it does: while a process becomes another
    # program, /proc shows the environment of the one before, or none.
    raylet = subprocess.Popen(
        ["sh", "-c", "echo up; read -r _"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert raylet.stdout.readline() == b"up\n"
        uuids = [f"GPU-{letter}" for letter in "abcd"]
        assert visible_gpus(uuids, identify(raylet.pid)) == {f"GPU-{letter}" for letter in seen}
    finally:
        _end(raylet)
