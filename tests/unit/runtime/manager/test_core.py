"""The manager's inner workings beside agents' real hands on virtual GPUs; only Ray between them is left out."""

import asyncio
import threading
import time
import uuid
from dataclasses import replace
from functools import partial

import pytest

from pals_ray.config.fleet import parse_fleet_config
from pals_ray.control.budget.moving_budget import ScheduledBudget
from pals_ray.control.budget.schedule import Entry
from pals_ray.control.messages import Hello
from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.control.telemetry import RATE_S, TelemetryWindow
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.gpus.virtual_block import remove_block
from pals_ray.processes import ProcessId
from pals_ray.runtime.agent.devices import Devices
from pals_ray.runtime.agent.hands import Hands
from pals_ray.runtime.manager.budgeting import BudgetDesk
from pals_ray.runtime.manager.core import FleetCore
from pals_ray.runtime.manager.storage import ManagerState, StorageError, read_state, storage_file, write_state
from pals_ray.runtime.messages import AgentSpec, Beat, Registration
from pals_ray.runtime.node.hardware import HardwareSpec
from pals_ray.types import ReplicaTelemetry
from tests.support.fleets import wait_for


class Remote:
    """A method as Ray offers it."""

    def __init__(self, method):
        self.method = method

    def remote(self, *args):
        return asyncio.ensure_future(self.method(*args))


class Agent:
    """An agent's words and hands, without an actor around them."""

    def __init__(self, name, key, uuids):
        self.name, self.uuids = name, uuids
        self.devices = Devices(VirtualDriver.attach(key))
        self.hands = Hands(name, self.devices, ReplicaController(len(uuids)), TelemetryWindow())
        hardware = HardwareSpec("virtual")
        self.spec = AgentSpec(name, "m", len(uuids), "node", key, (), ProcessId(1, 1), "/x", hardware, "/s")
        self.apply, self.park = Remote(self._apply), Remote(self._park)

    async def _apply(self, grant):
        await self.hands.take_grant(grant)
        return await self.hands.report()

    async def _park(self, order):
        await self.hands.take_park(order)
        return await self.hands.report()

    async def join(self, core):
        while not self.hands.session:
            found = await self.devices.inventory()
            self.hands.managed = {gpu.info.uuid: replace(gpu, may_set=True) for gpu in found}
            ceiling_w, hands = await self.hands.ceiling_now_w(), self.hands
            hello = Hello(self.name, "node", len(self.uuids), hands.fence_epoch, hands.limits_w, ceiling_w)
            answer = core.register(Registration(self.spec, hello, tuple(hands.managed.values()), ()), self, None)
            hands.begin_session()
            await hands.obey(answer)

    async def claim(self, core):
        await self.hands.take_hold(self.uuids, 32, None)
        self.spec = replace(self.spec, gpus=tuple(self.uuids), max_batch=32)
        await self.hands.obey(core.claim(self.spec, self.hands.session, self.hands.limits_w))

    async def tell(self, core):
        beat = Beat(await self.hands.report(), ReplicaTelemetry(), {}, 0.0, None, None, "", None, {})
        await self.hands.obey(core.hear(beat))
        await self.join(core)


@pytest.fixture
def gpus():
    key = f"test-{uuid.uuid4().hex[:12]}"
    yield VirtualDriver.open(key, "A100-SXM", 4).gpus()
    remove_block(key)


@pytest.fixture
async def agents(gpus):
    key = gpus[0].uuid.removeprefix("GPU-virtual-").removesuffix("-0")
    made = [Agent("a", key, [gpus[0].uuid]), Agent("b", key, [gpu.uuid for gpu in gpus[1:3]])]
    yield made
    for agent in made:
        agent.devices.close()


def deploy(folder, budget_w=900.0, **more):
    core = FleetCore(str(folder), "session", lambda: None)
    model = {"llm_config": {"model_loading_config": {"model_id": "m"}}}
    content = {"budget_w": budget_w, "policy": "policies.uniform:allocate", "models": [model], **more}
    core.reconfigure(parse_fleet_config(content, "a test"))
    core.state = replace(core.state, config=content)
    core.save()
    return core


async def beats(core, agents, limits_w, gpus):
    """Beats until these limits are in force."""
    async with asyncio.timeout(10):
        while [gpu.limit_w() for gpu in gpus] != pytest.approx(limits_w, abs=0.01):
            for agent in agents:
                await agent.tell(core)
            core.make_way()
            core.divide()
            await asyncio.sleep(0.02)


@pytest.fixture
async def core(tmp_path, agents, gpus):
    made = deploy(tmp_path)
    for agent in agents:
        await agent.join(made)
        await agent.claim(made)
    await beats(made, agents, [266.666] * 3 + [100], gpus)
    await made.written()
    return made


class SlowDisk:
    """A disk that writes nothing before it is let to; `order` is what it wrote and what was sent."""

    def __init__(self, monkeypatch, agents):
        self.order, self.goes_on = [], threading.Event()
        monkeypatch.setattr("pals_ray.runtime.manager.storage.write_state", self._write)
        for agent in agents:
            apply = agent.apply.remote
            monkeypatch.setattr(agent.apply, "remote", partial(self._apply, agent, apply))

    def _apply(self, agent, apply, grant):
        self.order.append(agent.name)
        return apply(grant)

    def _write(self, path, state):
        assert self.goes_on.wait(10)
        write_state(path, state)
        self.order.append("disk")


@pytest.fixture
def slow_disk(monkeypatch, core, agents):
    made = SlowDisk(monkeypatch, agents)
    yield made
    made.goes_on.set()


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_parked_claimed_and_raised_the_fleet_keeps_the_budget(core, agents, gpus):
    core.send(core.ledger.set_budget(500.0, time.monotonic()))
    await beats(core, agents, [133.333] * 3 + [100], gpus)
    assert core.ledger.reserved_w() <= 500.0


async def test_a_cut_is_in_force_while_the_disk_is_slow_but_is_not_confirmed_before_it_is_written_down(
    core, agents, gpus, slow_disk, tmp_path
):
    cut = asyncio.create_task(BudgetDesk(core).set(500.0))
    await until(lambda: [gpu.limit_w() for gpu in gpus] == pytest.approx([133.333] * 3 + [100], abs=0.01))
    assert not cut.done()
    assert slow_disk.order == ["a", "b"]
    slow_disk.goes_on.set()
    await cut
    assert read_state(str(tmp_path)).budget_w == 500.0


async def test_a_raise_waits_for_a_slow_disk_and_a_cut_overtakes_it(core, agents, gpus, slow_disk, tmp_path):
    raised = asyncio.create_task(BudgetDesk(core).set(1000.0))
    await until(lambda: core.ledger.budget_w == 1000.0)
    core.divide()
    assert slow_disk.order == []
    core.send(core.ledger.set_budget(500.0, time.monotonic()))
    await until(lambda: [gpu.limit_w() for gpu in gpus] == pytest.approx([133.333] * 3 + [100], abs=0.01))
    assert slow_disk.order == ["a", "b"]
    slow_disk.goes_on.set()
    await raised
    assert slow_disk.order[2] == "disk"
    await beats(core, agents, [133.333] * 3 + [100], gpus)


async def test_a_cut_from_a_raise_that_waits_for_the_disk_waits_too_where_it_lifts_a_limit(
    core, agents, gpus, slow_disk
):
    core.send(core.ledger.set_budget(1200.0, time.monotonic()))
    core.divide()
    core.send(core.ledger.set_budget(1000.0, time.monotonic()))
    await asyncio.sleep(0)
    assert slow_disk.order == []
    slow_disk.goes_on.set()
    await until(lambda: slow_disk.order)
    assert slow_disk.order[0] == "disk"
    await beats(core, agents, [300] * 3 + [100], gpus)


async def test_no_answer_is_there_before_what_it_promises_is_on_disk_and_one_write_takes_all_that_waits(
    core, agents, slow_disk, tmp_path
):
    writes = [asyncio.create_task(core.store(budget_w=float(watts))) for watts in range(900, 910)]
    await until(lambda: core.state.budget_w == 909.0)
    assert not any(write.done() for write in writes)
    slow_disk.goes_on.set()
    await asyncio.gather(*writes)
    assert slow_disk.order == ["disk"]
    assert read_state(str(tmp_path)).budget_w == 909.0


async def test_what_a_fleet_that_stops_forgets_stays_forgotten(core, slow_disk, tmp_path):
    late = [asyncio.create_task(core.store(budget_w=800.0))]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    late.append(asyncio.create_task(core.store(budget_w=801.0)))
    await asyncio.sleep(0)
    slow_disk.goes_on.set()
    core.forget_all()
    await asyncio.gather(*late, return_exceptions=True)
    assert read_state(str(tmp_path)) == ManagerState(epoch=core.state.epoch)


async def test_a_budget_that_cannot_be_written_down_is_refused_and_what_was_cut_for_it_rises_again(
    core, agents, gpus, monkeypatch
):
    def full(*_):
        raise StorageError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("pals_ray.runtime.manager.storage.write_state", full)
        with pytest.raises(StorageError, match="no space"):
            await BudgetDesk(core).set(500.0)
    assert (core.ledger.budget_w, core.state.budget_w) == (900.0, 900.0)
    await beats(core, agents, [266.666] * 3 + [100], gpus)


async def test_a_manager_that_lost_its_file_has_a_larger_epoch_and_takes_the_agents_over(core, agents, gpus, tmp_path):
    storage_file(str(tmp_path)).unlink()
    await asyncio.sleep(1.1)  # within one second two managers could have the same epoch
    newer = deploy(tmp_path, 600.0)
    assert newer.state.epoch > core.state.epoch
    await beats(newer, agents, [166.666] * 3 + [100], gpus)


async def test_what_is_on_disk_is_taken_up_with_the_next_epoch(core, agents, gpus, tmp_path):
    newer = FleetCore(str(tmp_path), "session", lambda: None)
    assert newer.state.epoch == core.state.epoch + 1
    newer.restore(parse_fleet_config(dict(newer.state.config), "the disk"))
    await beats(newer, agents, [266.666] * 3 + [100], gpus)
    assert set(newer.roster.specs) == {"a", "b"}


async def test_a_node_that_cannot_be_reached_stays_charged_and_one_that_is_gone_is_forgotten(core, agents, tmp_path):
    core.node_lost("node")
    assert core.ledger.reserved_w() == pytest.approx(900, abs=1)
    assert set(core.roster.members) == {"a", "b"}
    core.node_gone("node")
    await core.written()
    assert core.ledger.reserved_w() == pytest.approx(0, abs=1e-6)
    assert (core.roster.members, core.roster.devices, core.ledger.nodes()) == ({}, {}, ())
    newer = FleetCore(str(tmp_path), "session", lambda: None)
    assert newer.state.nodes == (), "the next manager would charge it again"


async def test_targets_reach_the_agents_with_their_part_of_the_tokens(core, agents):
    await core.change_target("m", {"throughput_tokens_per_s": 100.0, "priority": 2})
    core.divide()
    for agent in agents:
        await agent.tell(core)
        assert (agent.hands._pilot.target.throughput_tokens_per_s, agent.hands._pilot.target.priority) == (50.0, 2)
    assert core.state.targets["m"].priority == 2


async def test_agents_look_at_latencies_for_as_long_as_replicas_serve_their_model(core, agents):
    core.divide()
    for agent in agents:
        await agent.tell(core)
        assert agent.hands._window.recent_s == 2 * RATE_S


def test_a_schedules_change_while_the_fleet_stops_does_not_keep_the_manager_busy(tmp_path):
    core = deploy(tmp_path)
    change_s = time.time() + 0.05
    core.state = replace(core.state, plan=ScheduledBudget((Entry(change_s, change_s + 60, 800.0),)))
    desk = BudgetDesk(core)
    desk.restore()
    assert desk.wait_s(1.0) < 0.1
    wait_for(lambda: time.time() > change_s, 1, "time stands still", 0.01)
    assert desk.wait_s(1.0) == 0.0
    core.stopping = True
    assert desk.wait_s(1.0) == 1.0
