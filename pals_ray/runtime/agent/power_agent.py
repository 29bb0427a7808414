"""The power agent: one actor per replica, on its node, which carries out what its core decides."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError

from pals_ray.control.agent import commands
from pals_ray.control.agent.agent_core import BEAT_S, AgentCore
from pals_ray.control.messages import AgentReport, Answer, Hello, LedgerError, ParkOrder, Registration
from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.control.telemetry import Reading
from pals_ray.engine.control_block import BlockError, ControlBlock
from pals_ray.errors import NotConfigured, PalsError
from pals_ray.runtime.agent.gpu_access import DrawMeter, GpuAccess, Sample
from pals_ray.runtime.agent.replica_watch import when_gone
from pals_ray.runtime.messages import AgentSpec, Measurement
from pals_ray.runtime.node.enrolment import enrol, keep_guardian
from pals_ray.runtime.node.ownership import find_raylet, is_ours, kill_engines, visible_gpus
from pals_ray.types import Grant

GUARDIAN_S = 2.0
CALL_TIMEOUT_S = 5.0
START_DEADLINE_S = 120.0
ASK_S = 0.1

log = logging.getLogger("pals.agent")


class RegistrationError(PalsError):
    """The manager did not take a replica in; its engine must not start."""


class PowerAgent:
    """Caps one replica's GPUs, limits its batch, and reports; see ARCHITECTURE.md, "Who does what"."""

    def __init__(self, spec: AgentSpec, ensure_manager: Callable[[str], Awaitable[Any]]) -> None:
        """`ensure_manager` finds the cluster's manager, or makes one that goes on from what is written at a path."""
        gc.freeze()  # modules stay: going through them again would hold up a cut for 50 ms
        self._spec = spec
        self._gpus = GpuAccess(spec.hardware.open(spec.node_key))
        self._core = AgentCore(spec.replica_id, spec.node_id, spec.num_gpus, ReplicaController(spec.num_gpus))
        self._block: ControlBlock | None = None
        self._unmanaged: tuple[str, ...] = ()
        self._draw = DrawMeter()
        self._power_w: dict[str, float] = {}
        self._unmanaged_w = 0.0
        self._idle = asyncio.Condition()
        self._calls: set[asyncio.Task[None]] = set()
        self._hello: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._pushed = 0
        self._ensure_manager = ensure_manager
        self._manager: Any | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._leaving = False

    # -- what others call --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Enrol the node, register the replica, and begin to beat. Returns when its engine may start; idempotent."""
        if self._loops:
            return
        try:
            await self._look_around()
            if self._spec.gpus:
                await self._take_hold()
            await self._register()
        except BaseException:
            asyncio.get_running_loop().call_later(0.5, os._exit, 1)
            raise
        when_gone(self._spec.replica, self._replica_gone)
        self._loops = [
            asyncio.create_task(self._every(BEAT_S, self._beat, "hold its point")),
            asyncio.create_task(self._every(GUARDIAN_S, self._see_to_guardian, "keep the node's guardian")),
        ]

    async def claim(self, uuids: list[str], max_batch: int) -> None:
        """The ranks' GPUs, by UUID: they are this replica's from now on, and may be raised."""
        foreign = sorted(set(uuids) - set(self._core.managed))
        if foreign or len(set(uuids)) != self._spec.num_gpus:
            raise RegistrationError(
                f"{self._spec.replica_id}: its ranks hold {uuids}, but {self._spec.num_gpus} different managed GPUs of "
                f"this node were expected, out of {sorted(self._core.managed)}"
            )
        manager = await self._find_manager()
        self._spec = replace(self._spec, gpus=tuple(uuids), max_batch=max_batch)
        await self._take_hold()
        answer: Answer = await manager.claim.remote(self._spec, self._core.session, self._core.limits_w)
        self._do(self._core.answered(answer, time.monotonic()))
        await self._until_idle()

    async def apply(self, grant: Grant) -> AgentReport:
        """Obey a grant that the manager pushed; the answer confirms what is in force."""
        self._pushed += 1
        try:
            self._do(self._core.granted(grant, time.monotonic()))
            return await self._report()
        finally:
            self._pushed -= 1

    async def park(self, order: ParkOrder) -> AgentReport:
        """Bring free GPUs of the node to the limits ordered, W."""
        self._do(self._core.park_ordered(order, time.monotonic()))
        return await self._report()

    async def measure(self) -> Measurement | None:
        """A fresh reading for a profiler; None where one of the replica's GPUs did not answer."""
        samples = await self._gpus.sample(self._spec.gpus)
        reading = self._reading(samples)
        limits_w = tuple(sample.state.limit_w for sample in samples.values())
        return None if reading is None else Measurement(reading, limits_w)

    async def ping(self) -> str:
        """The replica that this agent serves."""
        return self._spec.replica_id

    async def end(self) -> None:
        """End this actor's process."""
        ray.actor.exit_actor()

    # -- commands ----------------------------------------------------------------------------------------------------

    def _do(self, asked: tuple[commands.Command, ...]) -> None:
        """Carry the core's commands out; what takes time goes on by itself, whoever asked for it."""
        gpus, core = self._gpus, self._core
        for command in asked:
            match command:
                case commands.ReadLimits(uuids):
                    self._call(gpus.limits_w(uuids), core.limits_read)
                case commands.SetLimits(limits_w):
                    self._call(gpus.set_each(limits_w), core.limits_set)
                case commands.SetGroupCap(limits_w, cap_w):
                    self._call(
                        gpus.set_group(limits_w, cap_w), lambda now_w, at_s: core.limits_set(now_w, at_s, gpus.held_by)
                    )
                case commands.OrderEngine(limit, parked, ttft_limit_s, tpot_limit_s) if self._block is not None:
                    self._block.order_batch_limit(limit)
                    self._block.order_latency_limits(ttft_limit_s, tpot_limit_s)
                    self._block.park(parked)
                case commands.SendBeat():
                    self._tell()
                case commands.ConfirmGrant() if not self._pushed:  # else the answer to the push does
                    self._tell()
                case commands.SayHello(hello) if _is_over(self._hello):
                    self._hello = asyncio.create_task(self._say_hello(hello))
                    self._hello.add_done_callback(self._log_failure)

    def _call(
        self,
        call: Awaitable[dict[str, float]],
        then: Callable[[dict[str, float], float], tuple[commands.Command, ...]],
    ) -> None:
        """Have the devices do something, and tell the core what came of it."""

        async def to_the_end() -> None:
            try:
                asked = then(await call, time.monotonic())
            except Exception:
                log.exception("%s: a call to its GPUs failed", self._spec.replica_id)
                asked = self._core.call_failed(time.monotonic())
            self._do(asked)
            async with self._idle:
                self._idle.notify_all()

        task = asyncio.create_task(to_the_end())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _until_idle(self) -> None:
        """Wait until all that was asked of the core is in force."""
        async with self._idle:
            await self._idle.wait_for(lambda: self._core.idle)

    async def _report(self) -> AgentReport:
        await self._until_idle()
        return self._core.report()

    # -- words to the manager ----------------------------------------------------------------------------------------

    async def _find_manager(self) -> Any:
        if self._manager is None:
            self._manager = await self._ensure_manager(self._spec.storage_path)
        return self._manager

    async def _say_hello(self, hello: Hello) -> None:
        """Raises what the manager refuses the replica with."""
        async with asyncio.timeout(START_DEADLINE_S):  # a profile may have to be fitted
            manager = await self._find_manager()
            registration = Registration(self._spec, hello, tuple(self._core.managed.values()), self._unmanaged)
            me = ray.get_runtime_context().current_actor
            answer: Answer = await manager.register.remote(registration, me)
        if answer.reply.session:
            model = answer.model
            self._core.controller.take_model(model.surface if model else None, model.source if model else "")
        self._do(self._core.answered(answer, time.monotonic()))

    def _tell(self) -> None:
        """Send a beat, unless the manager has yet to answer the one before."""
        if _is_over(self._telling):
            self._telling = asyncio.create_task(self._send_beat())
            self._telling.add_done_callback(self._log_failure)

    async def _send_beat(self) -> None:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                manager = await self._find_manager()
                await self._until_idle()
                engine = self._block.telemetry() if self._block else None
                beat = self._core.beat(self._power_w, self._unmanaged_w, dict(self._gpus.errors), engine)
                answer: Answer = await manager.beat.remote(beat)
        except BaseException:
            self._manager = None  # the next beat looks for whichever there is then
            raise
        self._do(self._core.answered(answer, time.monotonic()))

    def _log_failure(self, talk: asyncio.Task[None]) -> None:
        if not talk.cancelled() and (error := talk.exception()) is not None:
            log.warning("%s: could not reach the manager this time: %s", self._spec.replica_id, error)

    # -- joining -----------------------------------------------------------------------------------------------------

    async def _look_around(self) -> None:
        """Enrol the node and tell its managed GPUs from the others."""
        found = await self._gpus.inventory()
        raylet = find_raylet()
        uuids = [gpu.info.uuid for gpu in found]
        visible = visible_gpus(uuids, raylet) if self._spec.hardware.kind == "nvml" else set(uuids)
        ours = {
            gpu.info.uuid: gpu
            for gpu in found
            if gpu.info.uuid in visible and all(is_ours(pid, raylet) for pid in gpu.holders)
        }
        self._unmanaged = tuple(gpu.info.uuid for gpu in found if gpu.info.uuid not in ours)
        node = await asyncio.to_thread(enrol, self._spec.node_key, self._spec.hardware, raylet, ours, self._gpus.look)
        self._core.managed = {uuid: replace(gpu, may_set=node.may_set[uuid]) for uuid, gpu in ours.items()}

    async def _take_hold(self) -> None:
        """The GPUs of the spec are the replica's: attach to its control block, and read their limits."""
        self._block = self._block or ControlBlock.attach(self._spec.block_path)
        self._do(self._core.claimed(self._spec.gpus, self._spec.max_batch, time.monotonic()))
        await self._until_idle()

    async def _register(self) -> None:
        """Say hello until the manager takes the replica, then wait until the engine may start.

        Where this agent replaces another, its engine has started.
        """
        until_s = time.monotonic() + START_DEADLINE_S
        reason = "no manager answered"
        while time.monotonic() < until_s:
            try:
                if not self._core.session:
                    self._do(self._core.greet(time.monotonic()))
                    await self._until_idle()
                    if self._hello is not None:
                        await self._hello
                if self._core.session:
                    await self._send_beat()
                    manager = await self._find_manager()
                    ready, reason = await manager.may_start.remote(self._spec.replica_id)
                    if ready or self._spec.gpus:
                        return
            except (LedgerError, NotConfigured, RayActorError) as error:
                # A replica before us may be on its way out, or a manager on its way in.
                reason = str(error)
            await asyncio.sleep(ASK_S)
        raise RegistrationError(f"{self._spec.replica_id} may not start its engine: {reason}")

    # -- the beat ----------------------------------------------------------------------------------------------------

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

    async def _beat(self) -> None:
        """Read the GPUs, then hold the point. Waits for no manager: the lease ends by this agent's own clock."""
        samples = await self._gpus.sample([*self._spec.gpus, *self._core.parked_w])
        self._power_w = self._draw.look({uuid: sample.state for uuid, sample in samples.items()}, time.monotonic())
        unmanaged = await self._gpus.sample(self._unmanaged)
        self._unmanaged_w = sum(sample.state.power_w for sample in unmanaged.values())
        self._do(self._core.beat_due(self._reading(samples), time.monotonic()))

    def _reading(self, samples: Mapping[str, Sample]) -> Reading | None:
        """The replica's reading; None where one of its GPUs did not answer."""
        mine = [samples[uuid] for uuid in self._spec.gpus if uuid in samples]
        if not mine or len(mine) < len(self._spec.gpus):
            return None
        return Reading(
            time_s=time.monotonic(),
            engine=self._block.telemetry() if self._block else None,
            energy_j=sum(sample.state.energy_j for sample in mine),
            power_w=sum(sample.state.power_w for sample in mine),
            binding=sum(sample.binding for sample in mine) / len(mine),
        )

    async def _see_to_guardian(self) -> None:
        await asyncio.to_thread(keep_guardian, self._spec.node_key)

    # -- leaving -----------------------------------------------------------------------------------------------------

    def _replica_gone(self) -> None:
        self._goodbye = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        """The replica's process is gone: lower its GPUs at once, say goodbye, park what the manager says, and end."""
        self._leaving = True
        for task in self._loops:
            task.cancel()
        self._do(self._core.replica_gone(time.monotonic()))
        try:
            goodbye = await self._report()
            async with asyncio.timeout(CALL_TIMEOUT_S):
                manager = await self._ensure_manager(self._spec.storage_path)
                await manager.leave.remote(goodbye)
        except Exception:  # the manager finds the agent dead and replaces it: nothing is lost, only later
            log.exception("%s: goodbye did not reach the manager", self._spec.replica_id)
        await asyncio.to_thread(kill_engines, self._spec.block_path)
        with suppress(BlockError):
            ControlBlock.attach(self._spec.block_path).unlink()
        self._gpus.close()
        # Only a method call may end the actor, not a task of its own.
        ray.get_runtime_context().current_actor.end.remote()


def _is_over(talk: asyncio.Task[None] | None) -> bool:
    """Whether a talk with the manager has ended, or is just hearing the answer."""
    return talk is None or talk.done() or talk is asyncio.current_task()
