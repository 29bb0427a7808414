"""The power agent: one per replica, on its node. It owns the replica's operating point inside the manager's grant."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError

from pals_ray.control.messages import AgentReport, Hello, LedgerError, ParkOrder
from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.control.slo import tally_of
from pals_ray.control.telemetry import Reading, TelemetryWindow
from pals_ray.engine.control_block import BlockError, ControlBlock
from pals_ray.errors import NotConfigured, PalsError
from pals_ray.processes import is_alive
from pals_ray.runtime.actors import ensure_manager
from pals_ray.runtime.agent.devices import Devices, DrawMeter, Sample
from pals_ray.runtime.agent.hands import Hands
from pals_ray.runtime.messages import AgentSpec, Answer, Beat, Measurement, Registration
from pals_ray.runtime.node.node_file import enrol, find_raylet, is_ours, keep_guardian, kill_engines, visible_gpus
from pals_ray.types import Grant

BEAT_S = 0.5
#: As often as the manager divides; what it pushes is confirmed at once.
TELL_S = 1.0
GUARDIAN_S = 2.0
CALL_TIMEOUT_S = 5.0
START_DEADLINE_S = 120.0

log = logging.getLogger("pals.agent")


class RegistrationError(PalsError):
    """The manager did not take a replica in; its engine must not start."""


class PowerAgent:
    """Caps one replica's GPUs, limits its batch, and reports; see ARCHITECTURE.md, "Who does what"."""

    def __init__(self, spec: AgentSpec) -> None:
        gc.freeze()  # modules stay: going through them again would hold up a cut for 50 ms
        self._spec = spec
        self._devices = Devices(spec.hardware.open(spec.node_key))
        self._window = TelemetryWindow()
        self._pilot = ReplicaController(spec.num_gpus)
        self._hands = Hands(spec.replica_id, self._devices, self._pilot, self._window)
        self._unmanaged: tuple[str, ...] = ()
        self._natural_draw_w: float | None = None
        self._draw = DrawMeter()
        self._power_w: dict[str, float] = {}
        self._unmanaged_w = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving = False
        self._manager: Any | None = None

    # -- what others call ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Enrol the node, register the replica, and begin to beat. Returns when its engine may start; idempotent."""
        if self._tasks:
            return
        try:
            await self._look_around()
            await self._register(deadline_s=START_DEADLINE_S)
        except BaseException:
            asyncio.get_running_loop().call_later(0.5, os._exit, 1)
            raise
        self._watch_replica()
        self._tasks = [
            asyncio.create_task(self._every(BEAT_S, self._hold, "hold its point")),
            asyncio.create_task(self._every(TELL_S, self._tell, "reach the manager")),
            asyncio.create_task(self._every(GUARDIAN_S, self._see_to_guardian, "keep the node's guardian")),
        ]

    async def claim(self, uuids: list[str], max_batch: int) -> None:
        """The ranks' GPUs, by UUID: they are this replica's from now on, and may be raised."""
        managed = self._hands.managed
        foreign = sorted(set(uuids) - set(managed))
        if foreign or len(set(uuids)) != self._spec.num_gpus:
            raise RegistrationError(
                f"{self._spec.replica_id}: its ranks hold {uuids}, but {self._spec.num_gpus} different managed GPUs of "
                f"this node were expected, out of {sorted(managed)}"
            )
        manager = await ensure_manager(self._spec.storage_path)
        self._spec = replace(self._spec, gpus=tuple(uuids), max_batch=max_batch)
        await self._take_hold()
        hands = self._hands
        await hands.obey(await manager.claim.remote(self._spec, hands.session, hands.limits_w))

    async def apply(self, grant: Grant) -> AgentReport:
        """Obey a grant that the manager pushed; the answer confirms what is in force."""
        await self._hands.take_grant(grant)
        return await self._hands.report()

    async def park(self, order: ParkOrder) -> AgentReport:
        """Bring free GPUs of the node to the limits ordered, W."""
        await self._hands.take_park(order)
        return await self._hands.report()

    async def measure(self) -> Measurement | None:
        """A fresh reading for a profiler; None where one of the replica's GPUs did not answer."""
        samples = await self._devices.sample(self._spec.gpus)
        if not samples or len(samples) < len(self._spec.gpus):
            return None
        mine = list(samples.values())
        return Measurement(_reading(mine, self._hands.block), tuple(sample.state.limit_w for sample in mine))

    async def ping(self) -> str:
        """The replica that this agent serves."""
        return self._spec.replica_id

    # -- joining ---------------------------------------------------------------------------------------------------

    async def _look_around(self) -> None:
        """Enrol the node and tell its managed GPUs from the others."""
        found = await self._devices.inventory()
        raylet = find_raylet()
        uuids = [gpu.info.uuid for gpu in found]
        visible = visible_gpus(uuids, raylet) if self._spec.hardware.kind == "nvml" else set(uuids)
        ours = {
            gpu.info.uuid: gpu
            for gpu in found
            if gpu.info.uuid in visible and all(is_ours(pid, raylet) for pid in gpu.holders)
        }
        self._unmanaged = tuple(gpu.info.uuid for gpu in found if gpu.info.uuid not in ours)
        node = await asyncio.to_thread(
            enrol, self._spec.node_key, self._spec.hardware, raylet, ours, self._devices.look
        )
        self._hands.managed = {uuid: replace(gpu, may_set=node.may_set[uuid]) for uuid, gpu in ours.items()}

    async def _take_hold(self) -> None:
        block = self._hands.block or ControlBlock.attach(self._spec.block_path)
        await self._hands.take_hold(self._spec.gpus, self._spec.max_batch, block)

    async def _register(self, deadline_s: float) -> None:
        """Say hello with what is in force, again until the manager takes it; then wait until the engine may start."""
        until_s = time.monotonic() + deadline_s
        reason = "no manager answered"
        while time.monotonic() < until_s:
            try:
                ready, reason = await self._ask_to_join(await ensure_manager(self._spec.storage_path))
            except (LedgerError, NotConfigured, RayActorError) as error:
                # A replica before us may be on its way out, or a manager on its way in.
                ready, reason = False, str(error)
            if ready:
                return
            await asyncio.sleep(0.1)
        raise RegistrationError(f"{self._spec.replica_id} may not start its engine: {reason}")

    async def _ask_to_join(self, manager: Any) -> tuple[bool, str]:
        """One attempt: whether the engine may start (or has, where this agent replaces another), and why not."""
        hands = self._hands
        if not hands.session:
            handle = ray.get_runtime_context().current_actor
            answer: Answer = await manager.register.remote(await self._registration(), handle)
            hands.begin_session()
            if answer.reply.session:
                model = answer.model
                self._pilot.take_model(model.surface if model else None, model.source if model else "")
            await hands.obey(answer)
            if not hands.session:
                return False, answer.reply.reason
        await self._beat(manager)
        ready, reason = await manager.may_start.remote(self._spec.replica_id)
        return ready or bool(self._spec.gpus and hands.session), reason

    async def _registration(self) -> Registration:
        hands = self._hands
        if self._spec.gpus and not hands.gpus:
            await self._take_hold()
        ceiling = await hands.ceiling_now_w()
        hello = Hello(
            replica_id=self._spec.replica_id,
            node_id=self._spec.node_id,
            num_gpus=self._spec.num_gpus,
            fence_epoch=hands.fence_epoch,
            limits_w=hands.limits_w,
            ceiling_w=ceiling,
        )
        return Registration(self._spec, hello, tuple(hands.managed.values()), self._unmanaged)

    # -- the beat --------------------------------------------------------------------------------------------------

    async def _every(self, period_s: float, act: Callable[[], Awaitable[None]], what: str) -> None:
        """Do it once a period, whatever goes wrong in one."""
        due_s = time.monotonic()
        while not self._leaving:
            try:
                await act()
            except Exception:
                log.exception("%s: could not %s this time", self._spec.replica_id, what)
            due_s = max(due_s + period_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())

    async def _hold(self) -> None:
        """Hold the operating point and look. Waits for no manager: the lease ends by this agent's own clock."""
        await self._hands.hold_point()
        self._power_w = await self._observe()
        self._unmanaged_w = await self._unmanaged_power_w()

    async def _tell(self) -> None:
        """Report to whichever manager there is, and obey its answer."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                if self._manager is None:
                    self._manager = await ensure_manager(self._spec.storage_path)
                await self._beat(self._manager)
                if not self._hands.session:
                    await self._register(CALL_TIMEOUT_S)
        except BaseException:
            self._manager = None  # the next beat looks for whichever there is then
            raise

    async def _see_to_guardian(self) -> None:
        await asyncio.to_thread(keep_guardian, self._spec.node_key)

    async def _beat(self, manager: Any) -> None:
        hands, pilot = self._hands, self._pilot
        beat = Beat(
            report=await hands.report(),
            telemetry=self._window.summary(),
            power_w=self._power_w,
            unmanaged_w=self._unmanaged_w,
            cap_w=min(hands.limits_w.values(), default=None),
            batch_limit=hands.batch_limit,
            reason=hands.reason,
            natural_draw_w=self._natural_draw_w,
            errors=dict(self._devices.errors),
            demand_tokens_per_s=pilot.demand_tokens_per_s,
            expected=pilot.expected,
            correction=pilot.correction,
            tails=pilot.tails,
            tally=tally_of(hands.block.telemetry(), pilot.target) if hands.block else None,
        )
        await hands.obey(await manager.beat.remote(beat))

    async def _observe(self) -> dict[str, float]:
        """Take a reading into the window; returns the draw of the GPUs that this agent looks after, W."""
        samples = await self._devices.sample([*self._spec.gpus, *self._hands.parked_w])
        mine = [samples[uuid] for uuid in self._spec.gpus if uuid in samples]
        if len(mine) == len(self._spec.gpus) and mine:
            self._window.add(_reading(mine, self._hands.block))
            seen = self._window.summary()
            self._pilot.look(time.monotonic(), seen)
            if (terms := self._hands.terms) is not None:
                self._natural_draw_w = self._pilot.natural_draw_w(self._window, seen, terms.max_limit_w)
        return self._draw.look({uuid: sample.state for uuid, sample in samples.items()}, time.monotonic())

    async def _unmanaged_power_w(self) -> float:
        samples = await self._devices.sample(self._unmanaged)
        return sum(sample.state.power_w for sample in samples.values())

    # -- leaving ---------------------------------------------------------------------------------------------------

    def _watch_replica(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            fd = os.pidfd_open(self._spec.replica.pid)
        except ProcessLookupError:
            fd = -1
        if fd < 0 or not is_alive(self._spec.replica):
            self._goodbye = loop.create_task(self._leave())
            return
        loop.add_reader(fd, self._replica_gone, fd)

    def _replica_gone(self, fd: int) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(fd)
        os.close(fd)
        self._goodbye = loop.create_task(self._leave())

    async def _leave(self) -> None:
        """The replica's process is gone: lower its GPUs at once, say goodbye, park what the manager says, and end."""
        self._leaving = True
        for task in self._tasks:
            task.cancel()
        await self._hands.let_go()
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                manager = await ensure_manager(self._spec.storage_path)
                await manager.leave.remote(await self._hands.report())
        except Exception:  # the manager finds the agent dead and replaces it: nothing is lost, only later
            log.exception("%s: goodbye did not reach the manager", self._spec.replica_id)
        await asyncio.to_thread(kill_engines, self._spec.block_path)
        with suppress(BlockError):
            ControlBlock.attach(self._spec.block_path).unlink()
        self._devices.close()
        # Only a method call may end the actor, not a task of its own.
        ray.get_runtime_context().current_actor.end.remote()

    async def end(self) -> None:
        """End this actor's process."""
        ray.actor.exit_actor()


def _reading(mine: list[Sample], block: ControlBlock | None) -> Reading:
    return Reading(
        time_s=time.monotonic(),
        engine=block.telemetry() if block else None,
        energy_j=sum(sample.state.energy_j for sample in mine),
        power_w=sum(sample.state.power_w for sample in mine),
        binding=sum(sample.binding for sample in mine) / len(mine),
    )
