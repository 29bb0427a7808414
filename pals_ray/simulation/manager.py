"""The global power manager on the virtual clock: it drives the manager's core, with a disk that takes no time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from pals_ray.control.manager import commands
from pals_ray.control.manager.fleet_record import FleetRecord
from pals_ray.control.manager.manager_core import BEAT_S, ManagerCore
from pals_ray.control.messages import Answer, Beat, Hello, NodeInfo
from pals_ray.models.lookup import LoadedModel
from pals_ray.simulation.agent import Agent
from pals_ray.simulation.budget import BudgetSource
from pals_ray.simulation.clock import Events, Mail
from pals_ray.simulation.setting import SimSetting


class Manager:
    """One manager's life. Agents' words reach it through `hello` and `beat`; it answers and pushes by mail."""

    def __init__(
        self,
        setting: SimSetting,
        events: Events,
        mail: Mail,
        source: BudgetSource,
        agents: Mapping[str, Agent],
        models: Mapping[str, LoadedModel],
        before: FleetRecord,
        now_s: float,
    ) -> None:
        """`before` is what the manager before wrote down; `models` are what predicts each replica."""
        self.grants = 0
        self.down = False
        self.budget_moved: Callable[[float, float], None] = lambda _now_s, _budget_w: None
        self._events = events
        self._mail = mail
        self._source = source
        self._agents = agents
        self._models = models
        self.core = ManagerCore(before)
        self.core.open(setting.deployment, source.budget_w, now_s)
        self.core.registry.restore(before.agents, now_s, models)
        self._do(self.core.follow(source.plan, source.set_w, source.start_s + now_s, now_s), now_s)

    def start(self, nodes: Iterable[NodeInfo], now_s: float) -> None:
        """At the start of the run: the nodes' GPUs, and their agents' hello and claim without delay.

        Raises `InfeasibleBudget` where they do not fit at their lowest caps.
        """
        core = self.core
        for node in nodes:
            core.add_node(node, now_s)
        for agent in self._agents.values():
            spec = agent.spec
            answer, _ = core.hello(Hello(spec.replica_id, spec.node_id, spec.num_gpus, core.record.epoch), now_s)
            core.registry.take_in(spec, (), self._models[spec.replica_id], now_s)
            answer, asked = core.claim(spec, answer.reply.session, agent.limits_w, now_s)
            self._do(asked, now_s)
            agent.answered(answer, now_s)

    def hello(self, hello: Hello, now_s: float) -> None:
        """An agent that this manager does not know yet."""
        if not self.down:
            self._answer(hello.replica_id, self.core.hello(hello, now_s), now_s)

    def beat(self, beat: Beat, now_s: float) -> None:
        """An agent's beat."""
        if not self.down:
            self._answer(beat.report.replica_id, self.core.heard(beat, now_s), now_s)

    def run(self, now_s: float) -> None:
        """Divide, and so again in `BEAT_S`."""
        if not self.down:
            self.look_at_budget(now_s)
            self._do(self.core.divide(now_s), now_s)
            self._events.at(now_s + BEAT_S, self.run)

    def look_at_budget(self, now_s: float) -> None:
        """Take the budget that holds now; where it changes before the next beat, look again then."""
        if self.down:
            return
        before_w = self.core.ledger.budget_w
        drawn_w = self._source.drawn_w(now_s)
        asked = self.core.move_budget(self._source.start_s + now_s, now_s, drawn_w)
        next_s = self._source.look(self.core.source, self.core.ledger.budget_w)
        if self.core.ledger.budget_w != before_w:
            self.budget_moved(now_s, self.core.ledger.budget_w)
        self._do(asked, now_s)
        if now_s < next_s < now_s + BEAT_S:
            self._events.at(next_s, self.look_at_budget)

    def _raise(self, now_s: float) -> None:
        if not self.down:
            self._do(self.core.raise_released(now_s), now_s)

    def _answer(self, replica_id: str, done: tuple[Answer, tuple[commands.Command, ...]], now_s: float) -> None:
        answer, asked = done
        self._mail.send(now_s, partial(self._agents[replica_id].answered, answer))
        self._do(asked, now_s)

    def _do(self, asked: tuple[commands.Command, ...], now_s: float) -> None:
        """Orders to park are not pushed: parked GPUs are at their lowest limits from the first."""
        for command in asked:
            match command:
                case commands.PushGrant(grant):
                    self.grants += 1
                    self._mail.send(now_s, partial(self._agents[grant.replica_id].granted, grant))
                case commands.WriteState(number):
                    self.core.written(number)
                case commands.WhenWritten(rest):
                    self._do(rest, now_s)
                case commands.RaiseAt(time_s):
                    self._events.at(time_s, self._raise)
