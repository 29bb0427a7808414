"""The manager's inner workings: configuration, ledger, books and file. It waits for nothing but the file.

`manager` is the actor around it, `budgeting` what moves its budget.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pals_ray.config.fleet import FleetConfig
from pals_ray.config.policy_path import load_policy
from pals_ray.control.allocation.policy_runner import PolicyRunner
from pals_ray.control.allocation.policy_shares import serving, targets_tokens_per_s
from pals_ray.control.allocation.replica_parking import ReplicaParking
from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.messages import AgentReport, Commands, NodeInfo, Reply
from pals_ray.control.snapshot import FleetSnapshot
from pals_ray.errors import InfeasibleBudget, NotConfigured
from pals_ray.gpus.base import permission_help
from pals_ray.models.lookup import LoadedModel
from pals_ray.runtime.manager.books import (
    changed_target,
    ledger_part,
    node_info,
    open_ledger,
    redescribed,
    refuse_too_little,
)
from pals_ray.runtime.manager.courier import Courier
from pals_ray.runtime.manager.measuring import HoldDesk
from pals_ray.runtime.manager.predictors import Predictors
from pals_ray.runtime.manager.roster import Roster
from pals_ray.runtime.manager.storage import ManagerState, NewerManager, StateWriter, StorageError, read_state
from pals_ray.runtime.manager.view import fleet_snapshot
from pals_ray.runtime.messages import AgentSpec, Answer, Beat, Registration
from pals_ray.types import Provenance, Target

log = logging.getLogger("pals.manager")


class FleetCore:
    """What is deployed and who is there; `on_change` is called when that asks for a new division of the budget."""

    def __init__(self, storage_path: str, session: str, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        before = read_state(storage_path)
        if before.session != session:
            before = replace(before, session=session, nodes=(), agents={})
        # Agents may still obey a manager whose file was lost: the time is a larger epoch than it can have had.
        known = before.epoch if before.epoch > 0 else int(time.time())
        self.state = replace(before, epoch=known + 1)
        self._file = StateWriter(storage_path, self._to_write)
        self._file.write_now(self.state)
        self.roster = Roster()
        self.desk = HoldDesk()
        self.courier = Courier(self.roster.handles, self.confirmed)
        self.targets: dict[str, Target] = {}
        self.stopping = False
        self._sending: set[asyncio.Task[None]] = set()
        self._targeting = asyncio.Lock()
        self._parts_tokens_per_s: Mapping[str, float | None] = {}
        self._serving: Mapping[str, int] = {}
        self._config: FleetConfig | None = None
        self._ledger: Ledger | None = None
        self._divider: PolicyRunner | None = None
        self._predictors: Predictors | None = None

    # -- what is deployed ------------------------------------------------------------------------------------------

    @property
    def is_configured(self) -> bool:
        """Whether anybody has deployed a fleet yet."""
        return self._ledger is not None

    @property
    def config(self) -> FleetConfig:
        """The configuration in force. Raises `NotConfigured`."""
        if self._config is None:
            raise NotConfigured("the manager has no configuration yet; it comes with `serve run deployments:app`")
        return self._config

    @property
    def ledger(self) -> Ledger:
        """The ledger in use: another one after a redeploy. Raises `NotConfigured`."""
        if self._ledger is None:
            raise NotConfigured("the manager has no configuration yet; it comes with `serve run deployments:app`")
        return self._ledger

    def restore(self, config: FleetConfig) -> None:
        """Take up what the manager before left on disk."""
        self._adopt(config, self.state.budget_w, self.state)
        self.roster.restore(self.state.agents, time.monotonic())

    def reconfigure(self, config: FleetConfig) -> None:
        """Change to another configuration. Raises `InfeasibleBudget` or `ConfigError`; nothing has changed then."""
        only_watts = self._config is not None and ledger_part(self._config) == ledger_part(config)
        if self._ledger is None or not only_watts:
            state = replace(self.state, plan=None, targets={})
            if self._ledger is not None:
                labels = {spec.node_id: spec.node_labels for spec in self.roster.specs.values()}
                nodes = redescribed(self._ledger.memo(), config, labels)
                refuse_too_little(config, nodes)
                state = replace(state, epoch=state.epoch + 1, nodes=nodes)
            self._adopt(config, config.budget_w, state)
            return
        divider = _divider(config)
        commands = self._ledger.set_budget(config.budget_w, time.monotonic())
        self._config, self._divider = config, divider
        self.targets = {model.model_id: model.target.target() for model in config.models}
        self.state = replace(self.state, budget_w=config.budget_w, plan=None, targets={})
        self.send(commands)

    def _adopt(self, config: FleetConfig, budget_w: float, state: ManagerState) -> None:
        """Open a ledger for this configuration on what is known of the nodes; agents say hello to it again.

        No budget is too small for that: limits may have come down since they were written down, and still can.
        """
        divider = _divider(config)
        ledger = open_ledger(config, budget_w, state.epoch, state.nodes)
        self._config, self._divider, self._ledger = config, divider, ledger
        self._predictors = Predictors(config)
        self.targets = {model.model_id: model.target.target() for model in config.models} | dict(state.targets)
        self.state = replace(state, budget_w=budget_w)

    async def change_target(self, model: str, changes: Mapping[str, Any]) -> Target:
        """Change what is wanted of a model, the rest of its target staying as it is. Raises `ConfigError`."""
        async with self._targeting:
            target = changed_target(self.targets, model, changes)
            await self.store(targets={**self.state.targets, model: target})
            self.targets[model] = target
        self._on_change()
        return target

    @property
    def notes(self) -> tuple[str, ...]:
        """What an operator should know of agents, policy and models, a sentence each."""
        parts = (part for part in (self._divider, self._predictors) if part is not None)
        return (*self.roster.errors, *(note for part in parts for note in part.notes))

    # -- agents: no answer goes before all that has to outlive us is `written` -------------------------------------

    def predict(self, registration: Registration) -> LoadedModel | None:
        """What predicts a new replica; None where nothing does. Slow where a profile has to be fitted."""
        if self._predictors is None or not registration.managed:
            return None
        gpu, spec = registration.managed[0].info, registration.spec
        virtual = gpu.provenance is Provenance.MODELLED
        return self._predictors.of(spec.model, gpu.product, spec.num_gpus, virtual=virtual)

    def register(self, registration: Registration, agent: Any, model: LoadedModel | None) -> Answer:
        """An agent's hello. Raises `InfeasibleBudget` where its node does not fit, `LedgerError` without free GPUs."""
        ledger, name = self.ledger, registration.spec.replica_id
        self._add_node(node_info(registration, self.config))
        reply = ledger.hello(registration.hello, time.monotonic())
        if not reply.session:
            return self._answer(reply, name)
        self.roster.take_in(registration, agent, model, time.monotonic())
        self.save()
        return replace(self._answer(reply, name), model=model)

    def _add_node(self, info: NodeInfo) -> None:
        ledger = self.ledger
        try:
            ledger.add_node(info, time.monotonic())
        except InfeasibleBudget as error:
            fixed = [gpu.uuid for gpu in info.gpus if not gpu.may_set]
            if not fixed:
                raise
            why = f"{error.why}. {permission_help('set its power limit', ', '.join(fixed))}"
            raise InfeasibleBudget(error.asked_w, error.needed_w, why) from None
        # Where a node came back under another id, the replicas of the one before went with its books.
        known = {view.replica_id for view in ledger.replicas(time.monotonic())}
        for name in [n for n, s in self.roster.specs.items() if n not in known and s.node_id != info.node_id]:
            self.roster.forget(name)

    def claim(self, spec: AgentSpec, session: int, limits_w: Mapping[str, float]) -> Answer:
        """The GPUs that a replica's ranks hold."""
        reply, commands = self.ledger.claim(spec.replica_id, session, limits_w, time.monotonic())
        if reply.session:
            self.roster.claimed(spec)
            self.save()
            self.send(commands)
            self._on_change()
        return self._answer(reply, spec.replica_id)

    def hear(self, beat: Beat) -> Answer:
        """An agent's beat."""
        now_s = time.monotonic()
        reply = self.ledger.report(beat.report, now_s)
        if reply.session and beat.report.replica_id in self.roster.members:
            self.roster.hear(beat, now_s)
            self._raise_if_due()
        return self._answer(reply, beat.report.replica_id)

    def leave(self, goodbye: AgentReport) -> None:
        """A replica has gone, and its agent sets no limit any more."""
        ledger = self.ledger
        self.roster.see(goodbye, {})
        self.roster.forget(goodbye.replica_id)
        self.send(ledger.leave(goodbye.replica_id, time.monotonic(), goodbye))
        self._on_change()

    def _answer(self, reply: Reply, replica_id: str) -> Answer:
        target, serving_now = self._target_of(replica_id), self._serving.get(replica_id, 1)
        return Answer(reply, self.config.fail_safe_cap_w, target, serving_now)

    def _target_of(self, replica_id: str) -> Target:
        """Its model's target, with this replica's part of the tokens/s."""
        member = self.roster.members.get(replica_id)
        target = self.targets.get(member.spec.model, Target()) if member else Target()
        part = self._parts_tokens_per_s.get(replica_id, target.throughput_tokens_per_s)
        return replace(target, throughput_tokens_per_s=part)

    # -- watts -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> FleetSnapshot:
        """What a policy decides on."""
        return fleet_snapshot(self.ledger, self.roster.members, self.targets, time.monotonic())

    def divide(self) -> None:
        """Ask the policy and send what the ledger allows of its answer."""
        ledger = self.ledger
        if self.stopping or self._divider is None:
            return
        snapshot = self.snapshot()
        self._parts_tokens_per_s, self._serving = targets_tokens_per_s(snapshot), serving(snapshot)
        shares = self._divider.shares(snapshot, self.roster.models, self.desk.holds)
        self.send(ledger.plan(shares, snapshot.now_s))

    def send_cuts(self, commands: Commands) -> Commands:
        """Send what only lowers caps, before anything is written down; returns the rest, for `send`.

        A disk may take longer than a cut has. Lost with this manager, a cut costs speed: what is on disk charges no
        less, and raises it again. But a cut from a raise that still waits for the disk may lift a limit.
        """
        goes = {cut.seq: self._file.is_written or self.ledger.lowers(cut) for cut in commands.cuts}
        self.courier.send(Commands(cuts=tuple(cut for cut in commands.cuts if goes[cut.seq])))
        return replace(commands, cuts=tuple(cut for cut in commands.cuts if not goes[cut.seq]))

    def send(self, commands: Commands) -> None:
        """Send cuts now, and the rest once what has to outlive us is on disk: a later cut may overtake it."""
        rest = self.send_cuts(commands)
        self._note_ledger()
        if self._file.is_written:
            self.courier.send(rest)
            return
        task = asyncio.create_task(self._send_written(rest))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_written(self, commands: Commands) -> None:
        try:
            await self.written()
        except StorageError:
            log.exception("not sent: %s", commands.reason)
        else:
            self.courier.send(commands)

    def confirmed(self, report: AgentReport) -> None:
        """What an agent has in force after an order that was pushed to it."""
        self.ledger.report(report, time.monotonic())
        self.roster.see(report, {})
        self._raise_if_due()

    def _raise_if_due(self) -> None:
        ledger = self.ledger
        if ledger.raise_due and not self.stopping:
            self.send(ledger.plan(None, time.monotonic()))

    def node_lost(self, node_id: str) -> None:
        """A node cannot be reached: all of it stays charged as last known."""
        self.ledger.node_lost(node_id)

    def node_gone(self, node_id: str) -> None:
        """A node is gone for good: what it was charged is free."""
        log.warning("node %s is gone: %s are forgotten", node_id, self.roster.forget_node(node_id) or "its parked GPUs")
        self.ledger.node_gone(node_id)
        self.save()
        self._on_change()

    # -- the file --------------------------------------------------------------------------------------------------

    async def store(self, **changes: Any) -> None:
        """Change what is on disk; where that cannot be written nothing has changed. Raises `StorageError`."""
        before = {name: getattr(self.state, name) for name in changes}
        self.state = replace(self.state, **changes)
        self.save()
        try:
            await self.written()
        except StorageError:
            self.state = replace(self.state, **before)
            self.save()  # a later write may have taken the change along
            raise

    def save(self) -> None:
        """What has to outlive this manager has changed: the next write takes it, and `written` waits for that."""
        self._file.note()
        if self._ledger is not None:
            self._ledger.saved()  # the file's business from here on: nothing is sent or answered before it is there

    async def written(self) -> None:
        """Return once all that has to outlive this manager is on disk; one that finds a newer one's file ends.

        Raises `StorageError`; whoever waits next has it tried again.
        """
        self._note_ledger()
        try:
            await self._file.written()
        except NewerManager:
            log.exception("starting again above the newer epoch")
            os._exit(1)  # Ray restarts what did not mean to end

    def _note_ledger(self) -> None:
        if self._ledger is not None and self._ledger.unsaved:
            self.save()

    def _to_write(self) -> ManagerState:
        self.state = replace(
            self.state,
            nodes=self._ledger.memo() if self._ledger else self.state.nodes,
            agents=self.roster.specs,
            node_keys={**self.state.node_keys, **self.roster.node_keys},
        )
        return self.state

    def make_way(self) -> None:
        """Where agents obey a newer epoch (our file was lost), begin again above it: none of our grants counts."""
        newer = self.ledger.superseded_by
        if newer is not None:
            self.state = replace(self.state, epoch=newer)
            with suppress(NewerManager):  # one newer still has written it, and ours is not needed
                self._file.write_now(self._to_write())
            log.warning("agents obey epoch %d, which is newer: starting again above it", newer)
            os._exit(1)

    def forget_all(self) -> None:
        """Forget budget and configuration, but for the epoch."""
        self._file.write_now(ManagerState(epoch=self.state.epoch))
        self._file.close()


def _divider(config: FleetConfig) -> PolicyRunner:
    policy = load_policy(config.policy)
    return PolicyRunner(config.policy, ReplicaParking(policy) if config.allow_parking else policy)
