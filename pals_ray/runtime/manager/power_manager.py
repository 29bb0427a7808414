"""The global power manager: one detached actor that owns the fleet's watts, and carries out what its core decides."""

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

from pals_ray.config.fleet import FleetConfig, parse_fleet_config
from pals_ray.control.budget.moving_budget import BudgetPlan
from pals_ray.control.manager import commands
from pals_ray.control.manager.fleet_status import FleetFacts, fleet_notes, fleet_status, measured_w
from pals_ray.control.manager.manager_core import BEAT_S, ManagerCore
from pals_ray.control.manager.measurement import MeasurementSubject
from pals_ray.control.manager.over_budget import OverBudget
from pals_ray.control.manager.slo_accounts import SloAccounts, unreachable
from pals_ray.control.messages import AgentReport, Answer, Beat, ParkOrder, Registration
from pals_ray.errors import InfeasibleBudget
from pals_ray.gpus.gpu_protocol import permission_help
from pals_ray.runtime.manager.agent_replacement import AgentReplacer
from pals_ray.runtime.manager.budget_changes import BudgetChanges
from pals_ray.runtime.manager.configuration import changed_target, deployment_of, same_ledger, stored_config
from pals_ray.runtime.manager.metrics import FleetMetrics
from pals_ray.runtime.manager.predictors import Predictors
from pals_ray.runtime.manager.storage import ManagerState, NewerManager, StateWriter, StorageError, read_state
from pals_ray.runtime.messages import AgentSpec
from pals_ray.types import BudgetChange, BudgetSource, FleetStatus, Grant, OperatingPoint, Provenance, Target

PUSH_TIMEOUT_S = 5.0

log = logging.getLogger("pals.manager")


class GlobalPowerManager:
    """Owns budget and ledger; hears every agent, divides by policy once a second and whenever something changes."""

    def __init__(self, storage_path: str, ensure_agent: Callable[[AgentSpec], Awaitable[Any]]) -> None:
        """`ensure_agent` finds a replica's agent, or makes one."""
        gc.freeze()  # as in the agents
        session = ray.get_runtime_context().get_session_name()
        before = read_state(storage_path)
        if before.session != session:
            before = replace(before, session=session, nodes=(), agents={})
        # Agents may still obey a manager whose file was lost: the time is a larger epoch than it can have had.
        self._state = replace(before, epoch=(before.epoch if before.epoch > 0 else int(time.time())) + 1)
        self._core = ManagerCore(self._state.record)
        self._writer = StateWriter(storage_path, self._to_write, self._core.written)
        self._writer.write_now(self._state)
        self._config: FleetConfig | None = None
        self._predictors: Predictors | None = None
        self._handles: dict[str, Any] = {}
        self._under_way: set[asyncio.Future[Any]] = set()
        self._changed = asyncio.Event()
        self._budget = BudgetChanges(self._core, self._do, self._written)
        self._targeting = asyncio.Lock()
        self._replacer = AgentReplacer(self._handles, ensure_agent, self._core.node_lost, self._node_gone)
        self._over = OverBudget(time.monotonic())
        self._slo = SloAccounts()
        self._metrics = FleetMetrics()
        stored = stored_config(self._state.config)
        if stored is not None:
            self._restore(stored)
        self._beats = asyncio.get_running_loop().create_task(self._run())

    def _restore(self, config: FleetConfig) -> None:
        """Go on with what the manager before left on disk."""
        core, state, now_s = self._core, self._state, time.monotonic()
        core.open(deployment_of(config), state.budget_w, now_s)
        core.registry.restore(state.agents, now_s)
        self._config, self._predictors = config, Predictors(config)
        self._do(core.follow(state.plan, state.budget_w, time.time(), now_s))
        self._budget.move()

    async def configure(self, content: Mapping[str, Any], version: str, app: str) -> None:
        """Take a deployed configuration. Idempotent; one built earlier than the present one changes nothing.

        The same content again keeps what an operator has set since: budget, schedule or signal, and targets. Raises
        `InfeasibleBudget` or `ConfigError`; the configuration before stays then.
        """
        async with self._budget.lock:
            core = self._core
            if version <= self._state.version:
                return
            config = parse_fleet_config(dict(content), "the deployed configuration")
            asked = core.write()
            if config != self._config:
                same = same_ledger(self._config, config)
                asked = core.reconfigure(deployment_of(config), time.monotonic(), same_ledger=same)
                self._config = config
                self._predictors = self._predictors if same else Predictors(config)
            self._state = replace(self._state, version=version, config=dict(content), app=app)
            core.stopping = False
            self._do((*asked, commands.DivideSoon()))
            await self._written()

    # -- agents ------------------------------------------------------------------------------------------------------

    async def register(self, registration: Registration, agent: Any) -> Answer:
        """An agent's hello. Raises `InfeasibleBudget` where its node does not fit, `LedgerError` without free GPUs."""
        spec = registration.spec
        predictors = self._predictors
        model = await asyncio.to_thread(predictors.of_new, registration) if predictors else None
        try:
            answer, asked = self._core.register(registration, model, time.monotonic())
        except InfeasibleBudget as error:
            fixed = [gpu.info.uuid for gpu in registration.managed if not gpu.may_set]
            if not fixed:
                raise
            why = f"{error.why}. {permission_help('set its power limit', ', '.join(fixed))}"
            raise InfeasibleBudget(error.asked_w, error.needed_w, why) from None
        if answer.reply.session and isinstance(spec, AgentSpec):
            self._handles[spec.replica_id] = agent
            self._state = replace(self._state, node_keys={**self._state.node_keys, spec.node_id: spec.node_key})
        return await self._answer(answer, asked)

    async def may_start(self, replica_id: str) -> tuple[bool, str]:
        """Whether a registered replica's engine may start, and why not yet."""
        return self._core.ledger.may_start(replica_id, time.monotonic())

    async def claim(self, spec: AgentSpec, session: int, limits_w: Mapping[str, float]) -> Answer:
        """The GPUs that a replica's ranks hold."""
        return await self._answer(*self._core.claim(spec, session, limits_w, time.monotonic()))

    async def beat(self, beat: Beat) -> Answer:
        """An agent's beat: what is in force, and what it sees."""
        return await self._answer(*self._core.heard(beat, time.monotonic()))

    async def leave(self, goodbye: AgentReport) -> None:
        """A replica has gone, and its agent sets no limit any more."""
        self._do(self._core.left(goodbye, time.monotonic()))
        self._handles.pop(goodbye.replica_id, None)
        await self._written()

    async def _answer(self, answer: Answer, asked: tuple[commands.Command, ...]) -> Answer:
        """An answer that may go: what it promises is on disk."""
        self._do(asked)
        await self._written()
        return answer

    def _node_gone(self, node_id: str) -> None:
        log.warning("node %s is gone: its replicas and parked GPUs are forgotten", node_id)
        self._do(self._core.node_gone(node_id))

    # -- operators ---------------------------------------------------------------------------------------------------

    async def set_budget(self, budget_w: float) -> BudgetChange:
        """Set the fleet's budget, W; returns when every cap is in force. See `pals_ray.runtime.client.Fleet`."""
        return await self._budget.set(budget_w)

    async def move_budget(self, plan: BudgetPlan) -> BudgetSource:
        """Have a schedule or signal move the budget until the next `set_budget`; see `BudgetChanges.follow`."""
        return await self._budget.follow(plan)

    async def set_target(self, model: str, changes: Mapping[str, Any]) -> Target:
        """Change what is wanted of a model, the rest of its target staying as it is. Raises `ConfigError`."""
        core = self._core
        _ = core.deployment
        async with self._targeting:
            target = changed_target(core.targets, model, changes)
            before = core.targets[model]
            self._do(core.set_target(model, target))
            try:
                await self._written()
            except StorageError:
                self._do(core.set_target(model, before))
                raise
        return target

    async def status(self) -> FleetStatus:
        """The whole fleet, now."""
        return self._status()

    def _status(self) -> FleetStatus:
        core, now_s = self._core, time.monotonic()
        ledger, devices, deployment = core.ledger, core.registry.devices, core.deployment
        virtual = any(d.gpu.info.provenance is Provenance.MODELLED for d in devices.values())
        configured_w = None if core.moves else deployment.budget_w
        slos = self._slo.statuses(core.registry, core.targets)
        predicted = self._predictors.notes if self._predictors else ()
        notes = (*core.notes, *predicted, *filter(None, map(unreachable, slos)))
        facts = FleetFacts(
            policy=deployment.policy_name,
            version=self._state.version,
            time_scale=deployment.time_scale if virtual else None,
            source=core.source,
            over_budget_w=self._over.worst_w,
            over_budget_s=self._over.total_s,
            last_settle_s=self._budget.last_settle_s,
            notes=(*notes, *fleet_notes(ledger, core.source, configured_w, now_s)),
            slos=slos,
        )
        return fleet_status(ledger, core.registry.members, core.targets, devices, facts, now_s)

    async def subject(self, model: str) -> MeasurementSubject:
        """The replica of a model that a profiler may measure. Raises `HoldRefused`."""
        return self._core.subject(model, time.monotonic())

    async def hold(self, replica_id: str, owner: str, point: OperatingPoint) -> None:
        """Keep a replica at a point for `HOLD_LEASE_S`, or renew that, and divide the rest. Raises `HoldRefused`."""
        self._do(self._core.hold(replica_id, owner, point, time.monotonic()))

    async def release(self, replica_id: str, owner: str) -> None:
        """End this owner's hold of a replica."""
        self._do(self._core.release(replica_id, owner))

    async def ping(self) -> int:
        """The manager's epoch."""
        return self._core.record.epoch

    # -- the end -----------------------------------------------------------------------------------------------------

    async def begin_stop(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """Divide no more. Returns our Serve application and (node id, node key) of every node that was ever ours."""
        self._core.stopping = True
        return self._state.app, tuple(self._state.node_keys.items())

    async def replicas_left(self) -> dict[str, str]:
        """Replicas that have not said goodbye, with the id of the node that each is, or was, on."""
        return {name: member.spec.node_id for name, member in self._core.registry.members.items()}

    async def finish_stop(self) -> None:
        """Forget budget and configuration, but for the epoch, and end."""
        self._writer.write_now(ManagerState(epoch=self._core.record.epoch))
        self._writer.close()
        self._beats.cancel()
        ray.actor.exit_actor()

    # -- commands ----------------------------------------------------------------------------------------------------

    def _do(self, asked: tuple[commands.Command, ...]) -> None:
        """Carry the core's commands out: all pushes are under way when this returns, whatever the caller does next."""
        core = self._core
        for command in asked:
            match command:
                case commands.PushGrant(grant):
                    self._push(grant.replica_id, "apply", grant)
                case commands.PushParking(order):
                    self._push(order.executor, "park", order)
                case commands.WriteState(number):
                    self._writer.ask(number)
                    self._begin(self._when_written(()))
                case commands.WhenWritten(rest):
                    self._begin(self._when_written(rest))
                case commands.RaiseAt(time_s):
                    delay_s = time_s - time.monotonic()
                    loop = asyncio.get_running_loop()
                    loop.call_later(delay_s, lambda: self._do(core.raise_released(time.monotonic())))
                case commands.DivideSoon():
                    self._changed.set()
                case commands.FindSilentAgent(replica_id, heard_s):
                    spec = core.registry.members[replica_id].spec
                    if isinstance(spec, AgentSpec):
                        self._replacer.find_agent(spec, heard_s)
                case commands.FindNode(node_id):
                    self._replacer.find_node(node_id)

    def _begin(self, act: Awaitable[None]) -> None:
        task = asyncio.ensure_future(act)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    def _push(self, replica_id: str, method: str, order: Grant | ParkOrder) -> None:
        """A push that is lost is repaired by the answer to the agent's next beat."""
        handle = self._handles.get(replica_id)
        if handle is not None:
            self._begin(self._confirm(replica_id, method, getattr(handle, method).remote(order)))

    async def _confirm(self, replica_id: str, method: str, answer: Awaitable[AgentReport]) -> None:
        try:
            async with asyncio.timeout(PUSH_TIMEOUT_S):
                report = await answer
        except (RayActorError, TimeoutError) as error:
            log.warning("%s did not confirm %s: %s", replica_id, method, error)
            return
        self._do(self._core.confirmed(report, time.monotonic()))

    # -- the file ----------------------------------------------------------------------------------------------------

    async def _when_written(self, asked: tuple[commands.Command, ...]) -> None:
        try:
            await self._written()
        except StorageError:
            log.exception("not sent, since it cannot be written down: %s", asked or "nothing")
        else:
            self._do(asked)

    async def _written(self) -> None:
        """Return once all that has to outlive this manager is on disk; one that finds a newer one's file ends.

        Raises `StorageError`; whoever waits next has it tried again.
        """
        try:
            await self._writer.written()
        except NewerManager:
            log.exception("starting again above the newer epoch")
            os._exit(1)  # Ray restarts what did not mean to end

    def _to_write(self) -> ManagerState:
        self._state = self._state.with_record(self._core.record)
        return self._state

    def _make_way(self) -> None:
        """Where agents obey a newer epoch (our file was lost), begin again above it: none of our grants counts."""
        newer = self._core.ledger.superseded_by
        if newer is not None:
            with suppress(NewerManager):  # one newer still has written it, and ours is not needed
                self._writer.write_now(replace(self._to_write(), epoch=newer))
            log.warning("agents obey epoch %d, which is newer: starting again above it", newer)
            os._exit(1)

    # -- the beat ----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        core = self._core
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), core.wait_s(time.time()))
            self._changed.clear()
            if self._config is None:
                continue
            for act in (self._make_way, self._budget.move, self._divide, self._count, self._look_after_agents):
                try:
                    act()
                except Exception:
                    log.exception("a beat failed; the next one comes in %g s", BEAT_S)
                await asyncio.sleep(0)  # a cut that came meanwhile goes first

    def _divide(self) -> None:
        self._do(self._core.divide(time.monotonic()))

    def _count(self) -> None:
        """Draw above the budget, what the models' clients had of it, and all that as metrics."""
        core, now_s = self._core, time.monotonic()
        self._over.count(measured_w(core.ledger, core.registry.devices), core.ledger.budget_w, now_s)
        self._slo.observe(core.registry, core.targets, now_s)
        self._metrics.export(self._status())

    def _look_after_agents(self) -> None:
        for name in self._handles.keys() - self._core.registry.members.keys():
            del self._handles[name]
        self._do(self._core.find_silent(time.monotonic()))
