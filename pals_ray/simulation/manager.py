"""The global power manager on the virtual clock: it drives the manager's core, with a disk that takes no time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from pals_ray.control.manager import commands
from pals_ray.control.manager.fleet_record import FleetRecord
from pals_ray.control.manager.manager_core import BEAT_S, ManagerCore
from pals_ray.control.messages import Beat, Hello, NodeInfo
from pals_ray.simulation.agent import Agent
from pals_ray.simulation.budget import BudgetSource
from pals_ray.simulation.clock import Network
from pals_ray.simulation.setting import SimSetting


class Manager:
    """One manager, which goes on from `before`, the record of the manager before it."""

    def __init__(
        self,
        setting: SimSetting,
        network: Network,
        source: BudgetSource,
        agents: Mapping[str, Agent],
        before: FleetRecord,
        now_s: float,
    ) -> None:
        self.grants, self.down = 0, False
        self._events = network.events
        self._network = network
        self._source = source
        self._agents = agents
        self.core = ManagerCore(before)
        self.core.open(setting.deployment, source.budget_w, now_s)
        self.core.registry.restore(before.agents, now_s, {name: agent.model for name, agent in agents.items()})
        self._do(self.core.follow(setting.plan, setting.budget_w, now_s, now_s), now_s)

    def start(self, nodes: Iterable[NodeInfo], now_s: float) -> None:
        """Add the nodes and claim every replica's GPUs at once. Raises `InfeasibleBudget` where they do not fit."""
        core = self.core
        for node in nodes:
            core.add_node(node, now_s)
        for agent in self._agents.values():
            spec = agent.spec
            answer, _ = core.hello(Hello(spec.replica_id, spec.node_id, spec.num_gpus, core.record.epoch), now_s)
            core.registry.take_in(spec, (), agent.model, now_s)
            answer, asked = core.claim(spec, answer.reply.session, agent.limits_w, now_s)
            self._do(asked, now_s)
            agent.hear(answer, now_s)

    def hear(self, said: Hello | Beat, now_s: float) -> None:
        """Answer an agent's hello or beat."""
        if not self.down:
            if isinstance(said, Beat):
                name, (answer, asked) = said.report.replica_id, self.core.heard(said, now_s)
            else:
                name, (answer, asked) = said.replica_id, self.core.hello(said, now_s)
            self._network.send(now_s, partial(self._agents[name].hear, answer))
            self._do(asked, now_s)

    def run(self, now_s: float) -> None:
        """Divide the budget, now and every `BEAT_S`."""
        if not self.down:
            self.look_at_budget(now_s)
            self._do(self.core.divide(now_s), now_s)
            self._events.at(now_s + BEAT_S, self.run)

    def look_at_budget(self, now_s: float) -> None:
        """Take the budget that holds now, and again when it changes before the next beat."""
        if self.down:
            return
        drawn_w = self._source.drawn_w(now_s)
        asked = self.core.move_budget(now_s, now_s, drawn_w)
        next_s = self._source.take(self.core.source, self.core.ledger.budget_w, now_s)
        self._do(asked, now_s)
        if now_s < next_s < now_s + BEAT_S:
            self._events.at(next_s, self.look_at_budget)

    def _raise(self, now_s: float) -> None:
        if not self.down:
            self._do(self.core.raise_released(now_s), now_s)

    def _do(self, asked: tuple[commands.Command, ...], now_s: float) -> None:
        """Carry out the core's commands. Orders to park need nothing: parked GPUs start at their lowest limits."""
        for command in asked:
            match command:
                case commands.PushGrant(grant):
                    self.grants += 1
                    self._network.send(now_s, partial(self._agents[grant.replica_id].hear, grant))
                case commands.WriteState(number):
                    self.core.written(number)
                case commands.WhenWritten(rest):
                    self._do(rest, now_s)
                case commands.RaiseAt(time_s):
                    self._events.at(time_s, self._raise)
