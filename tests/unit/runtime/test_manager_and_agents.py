"""The manager and agents beside virtual GPUs and a real file; only Ray between them is left out."""

import asyncio
import itertools
import threading
import time
import uuid
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from pals_ray.control.budget.schedule import Entry, Schedule
from pals_ray.engine.control_block import ControlBlock
from pals_ray.gpus.driver_choice import HardwareSpec
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.gpus.virtual_block import remove_block
from pals_ray.processes import identify
from pals_ray.runtime.agent.power_agent import PowerAgent
from pals_ray.runtime.manager import power_manager
from pals_ray.runtime.manager.power_manager import GlobalPowerManager
from pals_ray.runtime.manager.storage import ManagerState, StorageError, read_state, storage_file, write_state
from pals_ray.runtime.messages import AgentSpec

VERSIONS = itertools.count()


class Remote:
    """A method as Ray offers it."""

    def __init__(self, method):
        self.method = method

    def remote(self, *args):
        return asyncio.ensure_future(self.method(*args))


class Handle:
    """An actor as Ray offers it."""

    def __init__(self, actor):
        self.actor = actor

    def __getattr__(self, name):
        made = self.__dict__[name] = Remote(getattr(self.actor, name))
        return made


class Agent(PowerAgent):
    """An agent that beats when the test says so, on a node without raylet and guardian."""

    def __init__(self, name, key, uuids, folder, ensure_manager):
        block = ControlBlock.create(folder / f"block-{name}")
        super().__init__(
            AgentSpec(
                replica_id=name,
                model="m",
                num_gpus=len(uuids),
                node_id="node",
                node_key=key,
                replica=identify(),
                block_path=str(block.path),
                hardware=HardwareSpec("virtual", "A100-SXM", 4),
                storage_path="",
            ),
            ensure_manager,
        )
        self.name, self.uuids = name, uuids
        self.handle = Handle(self)

    async def _look_around(self):
        found = await self._gpus.inventory()
        self._core.managed = {gpu.info.uuid: replace(gpu, may_set=True) for gpu in found}

    async def join(self):
        await self._look_around()
        await self._register()

    async def tell(self):
        await self._beat()
        await self._send_beat()
        await self._until_idle()


@pytest.fixture
def gpus():
    key = f"test-{uuid.uuid4().hex[:12]}"
    yield VirtualDriver.open(key, "A100-SXM", 4).gpus()
    remove_block(key)


@pytest.fixture
def ray_less(monkeypatch):
    """Managers and agents find one another as `at` says: here `manager`, and the agent that says hello."""
    at = SimpleNamespace(manager=None)

    async def ensure_manager(_):
        return at.manager

    at.ensure_manager = ensure_manager
    monkeypatch.setattr(power_manager, "FleetMetrics", lambda: SimpleNamespace(export=lambda _: None))
    context = SimpleNamespace(get_session_name=lambda: "session", current_actor=None)
    monkeypatch.setattr(power_manager.ray, "get_runtime_context", lambda: context)
    return at


@pytest.fixture
async def agents(gpus, ray_less, tmp_path):
    key = gpus[0].uuid.removeprefix("GPU-virtual-").removesuffix("-0")
    (tmp_path / "blocks").mkdir()
    made = [
        Agent("a", key, [gpus[0].uuid], tmp_path / "blocks", ray_less.ensure_manager),
        Agent("b", key, [gpu.uuid for gpu in gpus[1:3]], tmp_path / "blocks", ray_less.ensure_manager),
    ]
    yield made
    for agent in made:
        agent._gpus.close()


class Manager(GlobalPowerManager):
    """A manager that divides when the test says so."""

    async def register(self, registration, agent):
        return await super().register(registration, self.agents[registration.spec.replica_id].handle)

    async def _run(self):
        await asyncio.Event().wait()


async def deploy(folder, ray_less, agents, budget_w=900.0, **more):
    manager = Manager(str(folder), None)
    manager.agents = {agent.name: agent for agent in agents}
    model = {"llm_config": {"model_loading_config": {"model_id": "m"}}}
    content = {"budget_w": budget_w, "policy": "policies.uniform:allocate", "models": [model], **more}
    await manager.configure(content, f"{time.time_ns()}{next(VERSIONS)}", "app")
    ray_less.manager = Handle(manager)
    for agent in agents:
        agent._manager = None
    return manager


async def beats(manager, agents, limits_w, gpus):
    """Beats until these limits are in force."""
    async with asyncio.timeout(10):
        while [gpu.limit_w() for gpu in gpus] != pytest.approx(limits_w, abs=0.01):
            for agent in agents:
                await agent.tell()
            manager._divide()
            await asyncio.sleep(0.02)


@pytest.fixture
async def manager(tmp_path, agents, gpus, ray_less):
    made = await deploy(tmp_path, ray_less, agents)
    for agent in agents:
        await agent.join()
        await agent.claim(agent.uuids, 32)
    await beats(made, agents, [266.666] * 3 + [100], gpus)
    await until(lambda: not made._core._raising)  # what was released last is handed out a little later
    await made._written()
    return made


class SlowDisk:
    """A disk that writes nothing before it is let to; `order` is what it wrote and what was sent."""

    def __init__(self, monkeypatch, agents):
        self.order, self.goes_on = [], threading.Event()
        monkeypatch.setattr("pals_ray.runtime.manager.storage.write_state", self._write)
        for agent in agents:
            apply = agent.handle.apply.remote
            monkeypatch.setattr(agent.handle.apply, "remote", partial(self._apply, agent, apply))

    def _apply(self, agent, apply, grant):
        self.order.append(agent.name)
        return apply(grant)

    def _write(self, path, state):
        assert self.goes_on.wait(10)
        write_state(path, state)
        self.order.append("disk")


@pytest.fixture
def slow_disk(monkeypatch, manager, agents):
    made = SlowDisk(monkeypatch, agents)
    yield made
    made.goes_on.set()


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def set_budget(manager, watts):
    """What a budget does before it is written down."""
    manager._do(manager._core.set_budget(watts, time.monotonic()))


async def test_parked_claimed_and_raised_the_fleet_keeps_the_budget(manager, agents, gpus):
    set_budget(manager, 500.0)
    await beats(manager, agents, [133.333] * 3 + [100], gpus)
    assert manager._core.ledger.reserved_w() <= 500.0


async def test_a_cut_is_in_force_while_the_disk_is_slow_but_is_not_confirmed_before_it_is_written_down(
    manager, agents, gpus, slow_disk, tmp_path
):
    cut = asyncio.create_task(manager.set_budget(500.0))
    await until(lambda: [gpu.limit_w() for gpu in gpus] == pytest.approx([133.333] * 3 + [100], abs=0.01))
    assert not cut.done()
    assert slow_disk.order == ["a", "b"]
    slow_disk.goes_on.set()
    await cut
    assert read_state(str(tmp_path)).budget_w == 500.0


async def test_a_raise_waits_for_a_slow_disk_and_a_cut_overtakes_it(manager, agents, gpus, slow_disk, tmp_path):
    raised = asyncio.create_task(manager.set_budget(1000.0))
    await until(lambda: manager._core.ledger.budget_w == 1000.0)
    manager._divide()
    assert slow_disk.order == []
    set_budget(manager, 500.0)
    await until(lambda: [gpu.limit_w() for gpu in gpus] == pytest.approx([133.333] * 3 + [100], abs=0.01))
    assert slow_disk.order == ["a", "b"]
    slow_disk.goes_on.set()
    await raised
    assert slow_disk.order[2] == "disk"
    await beats(manager, agents, [133.333] * 3 + [100], gpus)


async def test_a_cut_from_a_raise_that_waits_for_the_disk_waits_too_where_it_lifts_a_limit(
    manager, agents, gpus, slow_disk
):
    set_budget(manager, 1200.0)
    manager._divide()
    set_budget(manager, 1000.0)
    await asyncio.sleep(0)
    assert slow_disk.order == []
    slow_disk.goes_on.set()
    await until(lambda: slow_disk.order)
    assert slow_disk.order[0] == "disk"
    await beats(manager, agents, [300] * 3 + [100], gpus)


async def test_no_answer_is_there_before_what_it_promises_is_on_disk_and_one_write_takes_all_that_waits(
    manager, agents, slow_disk, tmp_path
):
    set_budget(manager, 889.0)
    await asyncio.sleep(0.05)  # its write is under way: all that comes now is in the next one
    told = [asyncio.create_task(agent._send_beat()) for agent in agents]
    for watts in range(890, 900):
        set_budget(manager, float(watts))
    answers = [asyncio.create_task(manager._written()) for _ in range(10)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in (*told, *answers))
    slow_disk.goes_on.set()
    await asyncio.gather(*told, *answers)
    assert slow_disk.order.count("disk") == 2
    assert read_state(str(tmp_path)).budget_w == 899.0


async def test_what_a_fleet_that_stops_forgets_stays_forgotten(manager, slow_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(power_manager.ray.actor, "exit_actor", lambda: None)
    set_budget(manager, 800.0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    set_budget(manager, 801.0)
    late = [asyncio.create_task(manager._written())]
    await asyncio.sleep(0)
    slow_disk.goes_on.set()
    await manager.finish_stop()
    await asyncio.gather(*late, return_exceptions=True)
    assert read_state(str(tmp_path)) == ManagerState(epoch=manager._core.record.epoch)


async def test_a_budget_that_cannot_be_written_down_is_refused_and_what_was_cut_for_it_rises_again(
    manager, agents, gpus, monkeypatch
):
    def full(*_):
        raise StorageError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("pals_ray.runtime.manager.storage.write_state", full)
        with pytest.raises(StorageError, match="no space"):
            await manager.set_budget(500.0)
        with pytest.raises(StorageError, match="no space"):
            await manager.set_target("m", {"priority": 3})
    assert (manager._core.ledger.budget_w, manager._core.record.budget_w) == (900.0, 900.0)
    assert manager._core.targets["m"].priority == manager._core.record.targets["m"].priority == 0
    await beats(manager, agents, [266.666] * 3 + [100], gpus)


async def test_a_manager_that_lost_its_file_has_a_larger_epoch_and_takes_the_agents_over(
    manager, agents, gpus, tmp_path, ray_less
):
    storage_file(str(tmp_path)).unlink()
    await asyncio.sleep(1.1)  # within one second two managers could have the same epoch
    newer = await deploy(tmp_path, ray_less, agents, 600.0)
    assert newer._core.record.epoch > manager._core.record.epoch
    await beats(newer, agents, [166.666] * 3 + [100], gpus)


async def test_what_is_on_disk_is_taken_up_with_the_next_epoch(manager, agents, gpus, tmp_path, ray_less):
    newer = Manager(str(tmp_path), None)
    newer.agents = manager.agents
    assert newer._core.record.epoch == manager._core.record.epoch + 1
    assert set(newer._core.record.agents) == {"a", "b"}
    ray_less.manager = Handle(newer)
    for agent in agents:
        agent._manager = None
    await beats(newer, agents, [266.666] * 3 + [100], gpus)
    assert await newer.ping() == manager._core.record.epoch + 1


async def test_a_node_that_cannot_be_reached_stays_charged_and_one_that_is_gone_is_forgotten(manager, agents, tmp_path):
    core = manager._core
    core.node_lost("node")
    assert core.ledger.reserved_w() == pytest.approx(900, abs=1)
    assert set(core.registry.members) == {"a", "b"}
    manager._node_gone("node")
    await manager._written()
    assert core.ledger.reserved_w() == pytest.approx(0, abs=1e-6)
    assert (core.registry.members, core.registry.devices, core.ledger.nodes()) == ({}, {}, ())
    assert read_state(str(tmp_path)).nodes == (), "the next manager would charge it again"


async def test_targets_reach_the_agents_with_their_part_of_the_tokens(manager, agents):
    await manager.set_target("m", {"throughput_tokens_per_s": 100.0, "priority": 2})
    manager._divide()
    for agent in agents:
        await agent.tell()
        target = agent._core.controller.target
        assert (target.throughput_tokens_per_s, target.priority) == (50.0, 2)
    assert manager._core.record.targets["m"].priority == 2


async def test_a_schedules_change_while_the_fleet_stops_does_not_keep_the_manager_busy(tmp_path, ray_less):
    core = (await deploy(tmp_path, ray_less, []))._core
    change_s = time.time() + 50.0
    plan = Schedule((Entry(change_s, change_s + 60, 800.0),))
    core.follow(plan, 900.0, change_s - 0.05, 1000.0)
    core.move_budget(change_s - 0.05, 1000.0)
    assert core.wait_s(change_s - 0.05) == pytest.approx(0.05)
    assert core.wait_s(change_s) == 0.0
    core.stopping = True
    assert core.wait_s(change_s) == 1.0
