"""The global power manager on the virtual clock: budget, ledger and policy as in `runtime/manager/power_manager.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from pals_ray.control.allocation.policy_runner import PolicyRunner
from pals_ray.control.allocation.policy_shares import serving, targets_tokens_per_s
from pals_ray.control.ledger.feasible_charges import LedgerConfig
from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.messages import Commands, Hello, NodeInfo, NodeMemo, ReplicaView, Reply
from pals_ray.control.replica.latency_feedback import TailFactors
from pals_ray.control.snapshot import FleetSnapshot, ReplicaSnapshot
from pals_ray.models.correction import CorrectedModel
from pals_ray.models.power_model import PowerModel
from pals_ray.simulation.agent import Agent, Beat
from pals_ray.simulation.budget import BudgetSource
from pals_ray.simulation.clock import Events, Mail
from pals_ray.simulation.setting import SimSetting
from pals_ray.types import ReplicaTelemetry, Target

BEAT_S = 1.0
#: Releases that come within so long of one another are handed out together: a plan looks at every replica.
RAISE_S = 0.02


@dataclass(slots=True)
class _Member:
    """One replica as the manager knows it."""

    agent: Agent
    target: Target
    belief: PowerModel
    beat: Beat | None = None


class Manager:
    """One manager's life. Agents' words reach it through `hello` and `beat`; it answers and pushes by mail."""

    def __init__(
        self,
        setting: SimSetting,
        events: Events,
        mail: Mail,
        source: BudgetSource,
        *,
        epoch: int,
        now_s: float,
        known: Iterable[NodeMemo] = (),
    ) -> None:
        """`known` is what the manager before wrote down."""
        self.grants = 0
        self.divisions = 0
        self.down = False
        self.budget_moved: Callable[[float, float], None] = lambda _now_s, _budget_w: None
        self._events = events
        self._mail = mail
        self._source = source
        self._members: dict[str, _Member] = {}
        self._raising = False
        self._parts: Mapping[str, float | None] = {}
        self._serving: Mapping[str, int] = {}
        self._divider = PolicyRunner(getattr(setting.policy, "__module__", "policy"), setting.policy)
        self._reserve_w = setting.fleet.reserve_w
        self.ledger = Ledger(
            LedgerConfig(reserve_w=self._reserve_w, lease_s=setting.lease_s),
            epoch=epoch,
            budget_w=source.budget_w,
            now_s=now_s,
            domains=setting.fleet.domains,
            known=known,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Why the policy has no answer at present; nothing while it has one."""
        return self._divider.notes

    # -- agents ----------------------------------------------------------------------------------------------------

    def add_node(self, info: NodeInfo, now_s: float) -> None:
        """A node's GPUs. Raises `InfeasibleBudget` where they do not fit at their lowest caps."""
        self.ledger.add_node(info, now_s)

    def join(self, agent: Agent, target: Target, belief: PowerModel) -> None:
        """Know a replica's agent, its model's target, and what predicts it."""
        self._members[agent.replica_id] = _Member(agent, target, belief)

    def register(self, agent: Agent, now_s: float) -> None:
        """At the start of the run: hello and claim without delay."""
        agent.fence(self.ledger.epoch)
        reply = self.ledger.hello(agent.hello(), now_s)
        reply, _ = self.ledger.claim(agent.replica_id, reply.session, agent.limits_w, now_s)
        agent.hear(reply, self._target_of(agent.replica_id), self._serving.get(agent.replica_id, 1), now_s)

    def hello(self, hello: Hello, now_s: float) -> None:
        """An agent that this manager does not know yet."""
        if not self.down:
            self._answer(hello.replica_id, self.ledger.hello(hello, now_s), now_s)

    def beat(self, beat: Beat, now_s: float) -> None:
        """An agent's beat."""
        if self.down:
            return
        name = beat.report.replica_id
        reply = self.ledger.report(beat.report, now_s)
        if reply.session:
            self._members[name].beat = beat
        self._answer(name, reply, now_s)
        if self.ledger.raise_due and not self._raising:
            self._raising = True
            self._events.at(now_s + RAISE_S, self._raise)

    def node_lost(self, node: str, _now_s: float) -> None:
        """Nobody on it has answered for long enough."""
        self.ledger.node_lost(node)

    def _raise(self, now_s: float) -> None:
        """Hand out what has been released since the first report that said so."""
        self._raising = False
        if not self.down:
            self._send(self.ledger.plan(None, now_s), now_s)

    # -- the beat --------------------------------------------------------------------------------------------------

    def run(self, now_s: float) -> None:
        """Divide, and so again in `BEAT_S`."""
        if self.down:
            return
        self.look_at_budget(now_s)
        self.divide(now_s)
        self._events.at(now_s + BEAT_S, self.run)

    def look_at_budget(self, now_s: float) -> None:
        """Take the budget that holds now; where it changes before the next beat, look again then."""
        if self.down:
            return
        needed_w = self.ledger.needed_w(now_s)
        occupied_w = self.ledger.reserved_w() + self._reserve_w
        budget_w, next_s = self._source.at(now_s, needed_w=needed_w, occupied_w=occupied_w)
        if budget_w != self.ledger.budget_w:
            commands = self.ledger.set_budget(budget_w, now_s)
            self.budget_moved(now_s, budget_w)
            self._send(commands, now_s)
        if now_s < next_s < now_s + BEAT_S:
            self._events.at(next_s, self.look_at_budget)

    def divide(self, now_s: float) -> None:
        """Ask the policy and send what the ledger allows of its answer."""
        snapshot = self._snapshot(now_s)
        self._parts, self._serving = targets_tokens_per_s(snapshot), serving(snapshot)
        shares = self._divider.shares(snapshot, self._models())
        self.divisions += shares is not None
        self._send(self.ledger.plan(shares, now_s), now_s)

    def _snapshot(self, now_s: float) -> FleetSnapshot:
        return self.ledger.snapshot([self._replica(view) for view in self.ledger.replicas(now_s)], now_s)

    def _replica(self, view: ReplicaView) -> ReplicaSnapshot:
        member = self._members[view.replica_id]
        beat = member.beat
        return view.snapshot(
            member.agent.model,
            member.agent.engine.max_batch,
            member.target,
            beat.telemetry if beat else ReplicaTelemetry(),
            beat.natural_draw_w if beat else None,
            beat.demand_tokens_per_s if beat else None,
            beat.tails if beat else TailFactors(),
        )

    def _models(self) -> dict[str, PowerModel]:
        """What predicts each replica, corrected by what its agent saw."""
        return {
            name: CorrectedModel(m.belief, m.beat.correction, len(m.agent.uuids)) if m.beat else m.belief
            for name, m in self._members.items()
        }

    def _target_of(self, name: str) -> Target:
        """Its model's target, with this replica's part of the tokens/s."""
        target = self._members[name].target
        return replace(target, throughput_tokens_per_s=self._parts.get(name, target.throughput_tokens_per_s))

    # -- sending ---------------------------------------------------------------------------------------------------

    def _answer(self, name: str, reply: Reply, now_s: float) -> None:
        self.ledger.saved()
        answer = partial(self._members[name].agent.hear, reply, self._target_of(name), self._serving.get(name, 1))
        self._mail.send(now_s, answer)

    def _send(self, commands: Commands, now_s: float) -> None:
        # What is to outlive the manager is taken from its ledger when it goes: the same as if it had been written now.
        self.ledger.saved()
        for grant in (*commands.cuts, *commands.raises):
            self.grants += 1
            self._mail.send(now_s, partial(self._members[grant.replica_id].agent.obey, grant))
