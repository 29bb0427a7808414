"""The global power manager: one detached actor that owns the fleet's watts.

It decides nothing itself: the policy divides, the ledger says what may be sent, and it sends.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray

from pals_ray.config.fleet import parse_fleet_config
from pals_ray.control.budget.moving_budget import BudgetPlan
from pals_ray.control.messages import AgentReport
from pals_ray.runtime.manager.agent_replacement import AgentReplacer
from pals_ray.runtime.manager.budgeting import BudgetDesk
from pals_ray.runtime.manager.core import FleetCore
from pals_ray.runtime.manager.excess import ExcessMeter
from pals_ray.runtime.manager.measuring import MeasurementSubject
from pals_ray.runtime.manager.metrics import FleetMetrics
from pals_ray.runtime.manager.qos_book import SloAccounts
from pals_ray.runtime.manager.view import FleetFacts, fleet_status, measured_w
from pals_ray.runtime.messages import AgentSpec, Answer, Beat, Registration
from pals_ray.types import BudgetChange, BudgetSource, FleetStatus, OperatingPoint, Provenance, Target

BEAT_S = 1.0

log = logging.getLogger("pals.manager")


class GlobalPowerManager:
    """Owns budget and ledger; hears every agent, divides by policy once a second and whenever something changes."""

    def __init__(self, storage_path: str) -> None:
        gc.freeze()  # as in the agents
        self._changed = asyncio.Event()
        self._core = FleetCore(storage_path, ray.get_runtime_context().get_session_name(), self._changed.set)
        self._budget = BudgetDesk(self._core)
        self._keeper = AgentReplacer(self._core.roster, self._core.node_lost, self._core.node_gone)
        self._excess = ExcessMeter(time.monotonic())
        self._qos = SloAccounts()
        self._metrics = FleetMetrics()
        stored = self._core.state.config
        if stored is not None:
            self._core.restore(parse_fleet_config(dict(stored), "the stored configuration"))
            self._budget.restore()
        self._beats = asyncio.get_running_loop().create_task(self._run())

    async def configure(self, content: Mapping[str, Any], version: str, app: str) -> None:
        """Take a deployed configuration. Idempotent; one built earlier than the present one changes nothing.

        The same content again keeps what an operator has set since: budget, schedule or signal, and targets. Raises
        `InfeasibleBudget` or `ConfigError`; the configuration before stays then.
        """
        async with self._budget.lock:
            core = self._core
            if version <= core.state.version:
                return
            config = parse_fleet_config(dict(content), "the deployed configuration")
            if not (core.is_configured and config == core.config):
                core.reconfigure(config)
                self._budget.end()
            core.state = replace(core.state, version=version, config=dict(content), app=app)
            core.stopping = False
            core.save()
            self._changed.set()
            await core.written()

    # -- agents ----------------------------------------------------------------------------------------------------

    async def register(self, registration: Registration, agent: Any) -> Answer:
        """An agent's hello. Raises `InfeasibleBudget` where its node does not fit, `LedgerError` without free GPUs."""
        model = await asyncio.to_thread(self._core.predict, registration)
        return await self._written(self._core.register(registration, agent, model))

    async def may_start(self, replica_id: str) -> tuple[bool, str]:
        """Whether a registered replica's engine may start, and why not yet."""
        return self._core.ledger.may_start(replica_id, time.monotonic())

    async def claim(self, spec: AgentSpec, session: int, limits_w: Mapping[str, float]) -> Answer:
        """The GPUs that a replica's ranks hold."""
        return await self._written(self._core.claim(spec, session, limits_w))

    async def beat(self, beat: Beat) -> Answer:
        """An agent's beat: what is in force, and what it sees."""
        return await self._written(self._core.hear(beat))

    async def leave(self, goodbye: AgentReport) -> None:
        """A replica has gone, and its agent sets no limit any more."""
        self._core.leave(goodbye)
        await self._core.written()

    async def _written(self, answer: Answer) -> Answer:
        """An answer that may go: what it promises is on disk."""
        await self._core.written()
        return answer

    # -- operators -------------------------------------------------------------------------------------------------

    async def set_budget(self, budget_w: float) -> BudgetChange:
        """Set the fleet's budget, W; returns when every cap is in force. See `pals_ray.runtime.client.Fleet`."""
        return await self._budget.set(budget_w)

    async def move_budget(self, plan: BudgetPlan) -> BudgetSource:
        """Have a schedule or signal move the budget until the next `set_budget`; see `BudgetDesk.follow`."""
        return await self._budget.follow(plan)

    async def set_target(self, model: str, changes: Mapping[str, Any]) -> Target:
        """Change what is wanted of a model, the rest of its target staying as it is. Raises `ConfigError`."""
        _ = self._core.config
        return await self._core.change_target(model, changes)

    async def status(self) -> FleetStatus:
        """The whole fleet, now."""
        return self._status()

    def _status(self) -> FleetStatus:
        core, source, now_s = self._core, self._budget.source, time.monotonic()
        config, ledger, devices = core.config, core.ledger, core.roster.devices
        virtual = any(d.gpu.info.provenance is Provenance.MODELLED for d in devices.values())
        notes = list(core.notes)
        if source.warning is not None:
            notes.append(source.warning)
        if not self._budget.moves and ledger.budget_w != config.budget_w:
            notes.append(
                f"the budget was set to {ledger.budget_w:g} W since; the configuration says {config.budget_w:g} W"
            )
        rebuilding, why = ledger.rebuilding(now_s)
        if rebuilding:
            notes.append(why)
        lost = [node.node_id[:8] for node in ledger.nodes() if node.lost]
        if lost:
            notes.append(f"node {', '.join(lost)} cannot be reached: its GPUs stay charged what they last had")
        facts = FleetFacts(
            policy=config.policy,
            version=core.state.version,
            time_scale=config.time_scale if virtual else None,
            source=source,
            over_budget_w=self._excess.worst_w,
            over_budget_s=self._excess.total_s,
            last_settle_s=self._budget.last_settle_s,
            notes=tuple(notes),
            qos=self._qos.statuses(core.targets),
        )
        return fleet_status(ledger, core.roster.members, core.targets, devices, facts, now_s)

    async def subject(self, model: str) -> MeasurementSubject:
        """The replica of a model that a profiler may measure. Raises `HoldRefused`."""
        core = self._core
        return core.desk.subject(model, core.config, core.ledger, core.roster, core.snapshot())

    async def hold(self, replica_id: str, owner: str, point: OperatingPoint) -> None:
        """Keep a replica at a point for `HOLD_LEASE_S`, or renew that, and divide the rest. Raises `HoldRefused`."""
        core = self._core
        if core.desk.hold(replica_id, owner, point, core.ledger, core.snapshot()):
            self._changed.set()

    async def release(self, replica_id: str, owner: str) -> None:
        """End this owner's hold of a replica."""
        self._core.desk.holds.release(replica_id, owner)
        self._changed.set()

    async def ping(self) -> int:
        """The manager's epoch."""
        return self._core.state.epoch

    async def begin_stop(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """Divide no more. Returns our Serve application and (node id, node key) of every node that was ever ours."""
        core = self._core
        core.stopping = True
        return core.state.app, tuple(core.state.node_keys.items())

    async def replicas_left(self) -> dict[str, str]:
        """Replicas that have not said goodbye, with the id of the node that each is, or was, on."""
        return {name: spec.node_id for name, spec in self._core.roster.specs.items()}

    async def finish_stop(self) -> None:
        """Forget budget and configuration, and end."""
        self._core.forget_all()
        self._beats.cancel()
        ray.actor.exit_actor()

    # -- the beat --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        core = self._core
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._budget.wait_s(BEAT_S))
            self._changed.clear()
            if not core.is_configured:
                continue
            for act in (core.make_way, self._budget.move, core.divide, self._count, self._look_after_agents):
                try:
                    act()
                except Exception:
                    log.exception("a beat failed; the next one comes in %g s", BEAT_S)
                await asyncio.sleep(0)  # a cut that came meanwhile goes first

    def _count(self) -> None:
        """Draw above the budget, what the models' clients had of it, and all that as metrics."""
        core, now_s = self._core, time.monotonic()
        self._excess.count(measured_w(core.ledger, core.roster.devices), core.ledger.budget_w, now_s)
        self._qos.observe(core.roster.members, core.targets, now_s)
        self._metrics.export(self._status())

    def _look_after_agents(self) -> None:
        self._keeper.look_after(time.monotonic(), [node.node_id for node in self._core.ledger.nodes()])
