"""What the global power manager does about everything that reaches it: agents' words, operators' budgets, its beat.

Sans I/O: the core is told events with their time (`now_s`: the manager's monotonic clock, `wall_s`: Unix time) and
answers with commands. It knows no clock, disk or network; `runtime.manager` and `simulation` drive the same class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pals_ray.control.allocation.measurement_holds import MeasurementHolds
from pals_ray.control.allocation.policy_runner import PolicyRunner
from pals_ray.control.allocation.policy_shares import targets_tokens_per_s
from pals_ray.control.budget.moving_budget import BudgetMover, BudgetPlan
from pals_ray.control.budget.signal_following import FleetWatts
from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.manager import measurement
from pals_ray.control.manager.agent_registry import AgentRegistry
from pals_ray.control.manager.commands import Command, DivideSoon, RaiseAt
from pals_ray.control.manager.deployment import Deployment
from pals_ray.control.manager.dispatch import Dispatch
from pals_ray.control.manager.fleet_record import FleetRecord
from pals_ray.control.manager.fleet_status import fleet_snapshot, measured_w
from pals_ray.control.manager.measurement import MeasurementSubject
from pals_ray.control.manager.silent_agents import silent
from pals_ray.control.messages import (
    AgentReport,
    Answer,
    Beat,
    Commands,
    Hello,
    NodeInfo,
    Registration,
    ReplicaSpec,
    Reply,
)
from pals_ray.control.snapshot import Arrivals, FleetSnapshot
from pals_ray.errors import InfeasibleBudget, NotConfigured
from pals_ray.models.lookup import LoadedModel
from pals_ray.types import BudgetSource, OperatingPoint, Target

BEAT_S = 1.0
#: Releases that come within so long of one another are handed out together: a plan looks at every replica.
RAISE_S = 0.02


class ManagerCore:
    """One manager's life, on from `before`, what the one before it wrote down, with a larger epoch than it ever had."""

    def __init__(self, before: FleetRecord) -> None:
        self.registry = AgentRegistry()
        self.targets: dict[str, Target] = {}
        self.stopping = False
        self.divisions = 0
        self._before = before
        self._dispatch = Dispatch()
        self._holds = MeasurementHolds()
        self._deployment: Deployment | None = None
        self._ledger: Ledger | None = None
        self._runner: PolicyRunner | None = None
        self._mover: BudgetMover | None = None
        self._moved: BudgetSource | None = None
        self._parts_tokens_per_s: Mapping[str, float | None] = {}
        self._arrivals: Mapping[str, Arrivals | None] = {}
        self._raising = False

    # -- what is deployed --------------------------------------------------------------------------------------------

    @property
    def deployment(self) -> Deployment:
        """The deployment in force. Raises `NotConfigured` before the first."""
        if self._deployment is None:
            raise NotConfigured("the manager has no configuration yet; it comes with `serve run deployments:app`")
        return self._deployment

    @property
    def ledger(self) -> Ledger:
        """The ledger in use: another one after a redeploy."""
        _ = self.deployment
        assert self._ledger is not None
        return self._ledger

    @property
    def record(self) -> FleetRecord:
        """What is to be written down now."""
        nodes = self._ledger.memo() if self._ledger else self._before.nodes
        agents = {name: member.spec for name, member in self.registry.members.items()}
        return replace(self._before, nodes=nodes, agents=agents)

    @property
    def notes(self) -> tuple[str, ...]:
        """What an operator should know of agents and policy, a sentence each."""
        return (*self.registry.errors, *(self._runner.notes if self._runner else ()))

    def open(self, deployment: Deployment, budget_w: float, now_s: float) -> None:
        """Take up a deployment on what is known of the nodes; agents say hello to it again.

        No budget is too small for that: limits may have come down since they were written down, and still can.
        """
        before = self._before
        self._ledger = deployment.open_ledger(budget_w, before.epoch, before.nodes, now_s)
        self._deploy(deployment)
        self.targets |= before.targets
        self._before = replace(before, budget_w=budget_w)

    def reconfigure(self, deployment: Deployment, now_s: float, *, same_ledger: bool) -> tuple[Command, ...]:
        """Change to another deployment; with `same_ledger` only budget, policy and targets differ.

        Raises `InfeasibleBudget`; nothing has changed then.
        """
        record = replace(self.record, plan=None, targets={})
        orders = Commands()
        if self._ledger is not None and same_ledger:
            orders = self._ledger.set_budget(deployment.budget_w, now_s)
            self._before = replace(record, budget_w=deployment.budget_w)
            self._deploy(deployment)
        else:
            if self._ledger is not None:
                labels = {spec.node_id: spec.node_labels for spec in record.agents.values()}
                nodes = deployment.redescribed(record.nodes, labels)
                deployment.refuse_too_little(nodes, now_s)
                record = replace(record, epoch=record.epoch + 1, nodes=nodes)
            self._before = record
            self.open(deployment, deployment.budget_w, now_s)
        self._mover = self._moved = None
        return (*self._dispatch.send(orders, self.ledger, record_changed=True), DivideSoon())

    def _deploy(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._runner = PolicyRunner(deployment.policy_name, deployment.policy)
        self.targets = deployment.targets

    def set_target(self, model: str, target: Target) -> tuple[Command, ...]:
        """Want something else of a model."""
        self.targets[model] = target
        self._before = replace(self._before, targets={**self._before.targets, model: target})
        return (*self.write(), DivideSoon())

    # -- agents ------------------------------------------------------------------------------------------------------

    def add_node(self, info: NodeInfo, now_s: float) -> None:
        """Take a node's GPUs in. Raises `InfeasibleBudget` where they do not fit even at their lowest caps."""
        self.ledger.add_node(info, now_s)
        # Where a node came back under another id, the replicas of the one before went with its charge.
        known = {view.replica_id for view in self.ledger.replicas(now_s)}
        for name, member in list(self.registry.members.items()):
            if name not in known and member.spec.node_id != info.node_id:
                self.registry.forget(name)

    def register(
        self, registration: Registration, model: LoadedModel | None, now_s: float
    ) -> tuple[Answer, tuple[Command, ...]]:
        """An agent's hello; `model` is what predicts its replica.

        Raises `InfeasibleBudget` where its node does not fit, `LedgerError` without free GPUs.
        """
        self.add_node(self.deployment.node_info(registration), now_s)
        answer, commands = self.hello(registration.hello, now_s)
        if answer.reply.session:
            self.registry.take_in(registration.spec, registration.managed, model, now_s)
            answer = replace(answer, model=model)
        return answer, commands

    def hello(self, hello: Hello, now_s: float) -> tuple[Answer, tuple[Command, ...]]:
        """The hello of an agent whose node is known."""
        reply = self.ledger.hello(hello, now_s)
        return self._answer(reply, hello.replica_id), self._write_ledger()

    def claim(
        self, spec: ReplicaSpec, session: int, limits_w: Mapping[str, float], now_s: float
    ) -> tuple[Answer, tuple[Command, ...]]:
        """The GPUs that a replica's ranks hold, as its spec now says."""
        reply, orders = self.ledger.claim(spec.replica_id, session, limits_w, now_s)
        commands: tuple[Command, ...] = ()
        if reply.session:
            self.registry.claimed(spec)
            commands = (*self._dispatch.send(orders, self.ledger, record_changed=True), DivideSoon())
        return self._answer(reply, spec.replica_id), commands

    def heard(self, beat: Beat, now_s: float) -> tuple[Answer, tuple[Command, ...]]:
        """An agent's beat."""
        name = beat.report.replica_id
        reply = self.ledger.report(beat.report, now_s)
        if reply.session and name in self.registry.members:
            self.registry.hear(beat, now_s)
        return self._answer(reply, name), self._released(now_s)

    def confirmed(self, report: AgentReport, now_s: float) -> tuple[Command, ...]:
        """What an agent has in force after an order that was pushed to it."""
        self.ledger.report(report, now_s)
        self.registry.see(report, {})
        return self._released(now_s)

    def left(self, goodbye: AgentReport, now_s: float) -> tuple[Command, ...]:
        """A replica has gone, and its agent sets no limit any more."""
        self.registry.see(goodbye, {})
        self.registry.forget(goodbye.replica_id)
        orders = self.ledger.leave(goodbye.replica_id, now_s, goodbye)
        return (*self._dispatch.send(orders, self.ledger), DivideSoon())

    def node_lost(self, node_id: str) -> None:
        """A node cannot be reached: all of it stays charged as last known."""
        self.ledger.node_lost(node_id)

    def node_gone(self, node_id: str) -> tuple[Command, ...]:
        """A node is gone for good: what it was charged is free."""
        self.registry.forget_node(node_id)
        self.ledger.node_gone(node_id)
        return (*self.write(), DivideSoon())

    def find_silent(self, now_s: float) -> tuple[Command, ...]:
        """Whom nobody has heard for too long."""
        return silent(self.registry, [node.node_id for node in self.ledger.nodes()], now_s)

    def _answer(self, reply: Reply, replica_id: str) -> Answer:
        """With the model's target, of whose tokens/s this replica has its part, and what comes to those alike."""
        member = self.registry.members.get(replica_id)
        target = self.targets.get(member.spec.model, Target()) if member else Target()
        part = self._parts_tokens_per_s.get(replica_id, target.throughput_tokens_per_s)
        target = replace(target, throughput_tokens_per_s=part)
        return Answer(reply, self.deployment.fail_safe_cap_w, target, arrivals=self._arrivals.get(replica_id))

    def _released(self, now_s: float) -> tuple[Command, ...]:
        writes = self._write_ledger()
        if not self.ledger.raise_due or self._raising or self.stopping:
            return writes
        self._raising = True
        return (*writes, RaiseAt(now_s + RAISE_S))

    # -- watts -------------------------------------------------------------------------------------------------------

    def snapshot(self, now_s: float) -> FleetSnapshot:
        """What a policy decides on."""
        return fleet_snapshot(self.ledger, self.registry.members, self.targets, now_s)

    def divide(self, now_s: float) -> tuple[Command, ...]:
        """Ask the policy, and send what the ledger allows of its answer."""
        if self.stopping or self._runner is None:
            return ()
        snapshot = self.snapshot(now_s)
        self._parts_tokens_per_s = targets_tokens_per_s(snapshot)
        self._arrivals = {replica.replica_id: replica.arrivals for replica in snapshot.replicas}
        shares = self._runner.shares(snapshot, self.registry.models, self._holds)
        self.divisions += shares is not None
        return self._send(self.ledger.plan(shares, now_s))

    def raise_released(self, now_s: float) -> tuple[Command, ...]:
        """Hand out what has been released since the first report that said so."""
        self._raising = False
        return () if self.stopping else self._send(self.ledger.plan(None, now_s))

    def _send(self, orders: Commands) -> tuple[Command, ...]:
        return self._dispatch.send(orders, self.ledger)

    # -- the budget --------------------------------------------------------------------------------------------------

    @property
    def moves(self) -> str | None:
        """What moves the budget: a schedule or a signal; None where nothing does."""
        return None if self._mover is None else self._mover.name

    @property
    def source(self) -> BudgetSource:
        """What moves the budget, or that nothing does, for status."""
        set_w = self._before.budget_w
        return self._moved or BudgetSource("set", set_w, set_w, "as it was set")

    def wait_s(self, wall_s: float) -> float:
        """How long until the budget may have to move, s, at most one beat: while the fleet stops nothing moves it."""
        return BEAT_S if self._mover is None or self.stopping else self._mover.wait_s(wall_s, BEAT_S)

    def set_budget(self, budget_w: float, now_s: float) -> tuple[Command, ...]:
        """Set the fleet's budget, W, ending what moved it. Raises `InfeasibleBudget`; nothing has changed then."""
        orders = self.ledger.set_budget(budget_w, now_s)
        self._mover = self._moved = None
        self._before = replace(self._before, budget_w=budget_w, plan=None)
        return self._dispatch.send(orders, self.ledger, record_changed=True)

    def restore_budget(self, record: FleetRecord, budget_w: float, wall_s: float, now_s: float) -> tuple[Command, ...]:
        """A budget could not be written down: go back to the record and the budget of before, W."""
        commands = self._send(self.ledger.set_budget(budget_w, now_s))
        return (*commands, *self.follow(record.plan, record.budget_w, wall_s, now_s))

    def follow(self, plan: BudgetPlan | None, set_w: float, wall_s: float, now_s: float) -> tuple[Command, ...]:
        """Go by a plan from now on (None: by none), with the budget that was set, W. Raises `RegulationError`."""
        self._mover = None if plan is None else BudgetMover(plan, set_w, wall_s, now_s)
        self._moved = None
        self._before = replace(self._before, plan=plan, budget_w=set_w)
        return self.write()

    def move_budget(self, wall_s: float, now_s: float, drawn_w: float | None = None) -> tuple[Command, ...]:
        """Bring the budget to what a schedule or signal asks for now, as far as the fleet can be held to it.

        `drawn_w` is the fleet's mean draw since this was called last, where somebody knows it better than the agents.
        """
        if self._mover is None or self.stopping:
            return ()
        ledger, before_w = self.ledger, self.ledger.budget_w
        watts = FleetWatts(
            needed_w=ledger.needed_w(now_s),
            occupied_w=ledger.reserved_w() + ledger.config.reserve_w,
            drawn_w=self._drawn_w(now_s) if drawn_w is None else drawn_w,
        )
        budget_w, self._moved = self._mover.ask(watts, wall_s, now_s)
        if budget_w == before_w:
            return ()
        try:
            return self._send(ledger.set_budget(budget_w, now_s))
        except InfeasibleBudget as error:  # a domain over its own budget: what has been kept so far goes on
            self._moved = replace(self._moved, warning=f"the budget stays at {before_w:g} W: {error}")
            return ()

    def _drawn_w(self, now_s: float) -> float | None:
        """The fleet's draw as its agents last read it, W; None while one is not heard."""
        heard = not any(view.silent for view in self.ledger.replicas(now_s)) and bool(self.registry.devices)
        return measured_w(self.ledger, self.registry.devices) if heard else None

    # -- profilers ---------------------------------------------------------------------------------------------------

    def subject(self, model: str, now_s: float) -> MeasurementSubject:
        """The replica of a model that a profiler may measure. Raises `HoldRefused`."""
        return measurement.subject(
            model, self.deployment, self.ledger, self.registry, self._holds, self.snapshot(now_s)
        )

    def hold(self, replica_id: str, owner: str, point: OperatingPoint, now_s: float) -> tuple[Command, ...]:
        """Keep a replica at a point for `HOLD_LEASE_S`, or renew that, and divide the rest. Raises `HoldRefused`."""
        snapshot = self.snapshot(now_s)
        changed = measurement.hold(replica_id, owner, point, self.ledger, self._holds, snapshot)
        return (DivideSoon(),) if changed else ()

    def release(self, replica_id: str, owner: str) -> tuple[Command, ...]:
        """End this owner's hold of a replica."""
        self._holds.release(replica_id, owner)
        return (DivideSoon(),)

    # -- what is written down ----------------------------------------------------------------------------------------

    def written(self, number: int) -> None:
        """All that `WriteState` asked for up to this number is on disk."""
        self._dispatch.written(number)

    def write(self) -> tuple[Command, ...]:
        """Have the record written."""
        return self._dispatch.write(self._ledger)

    def _write_ledger(self) -> tuple[Command, ...]:
        """Have the state written where the ledger says that the next manager must know of a change."""
        return self.write() if self.ledger.unsaved else ()
