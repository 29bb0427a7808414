"""One simulated run: fleet, manager and agents on a virtual clock."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from heapq import merge
from itertools import count, repeat
from math import inf

from pals_ray.control.agent.agent_core import BEAT_S
from pals_ray.control.manager.fleet_record import FleetRecord
from pals_ray.control.manager.silent_agents import SILENT_S
from pals_ray.control.messages import Beat, Hello
from pals_ray.models.grid import GridModel
from pals_ray.models.lookup import LoadedModel
from pals_ray.models.physics.roofline import RooflineModel
from pals_ray.models.specs import find_gpu
from pals_ray.simulation.agent import Agent
from pals_ray.simulation.budget import BudgetSource, budget_at_start_w
from pals_ray.simulation.clock import Events, Network
from pals_ray.simulation.fleet import Fleet, Placed, build, node_info
from pals_ray.simulation.manager import Manager
from pals_ray.simulation.recorder import BudgetRecord, Samples
from pals_ray.simulation.setting import Failure, Offered, SimSetting, SimulationError

#: After the end it is looked so often whether all requests are judged, s.
_FOLLOW_STEP_S = 10.0
#: What comes when no request does any more: (time, model, request).
_NONE = (inf, -1, -1)


class Run:
    """The fleet, its agents and managers, and what is recorded of them."""

    def __init__(self, setting: SimSetting, requests: Offered) -> None:
        fixed = [model.fixed is not None for model in setting.fleet.models]
        if any(fixed) and not all(fixed):
            raise SimulationError("either all models stay at a fixed point, or none: a budget cannot hold half a fleet")
        self.setting = setting
        self.fleet: Fleet = build(setting, requests)
        self.events = Events()
        self.samples = Samples(
            [p.engine for p in self.fleet.placed],
            setting.interval_s,
            int(setting.duration_s / setting.interval_s + 1e-9),
        )
        self.targets_w: list[float] = []
        self.charges_w: list[float] = []
        parked_w = sum(map(self.fleet.parked_charge_w, setting.fleet.nodes))
        self.budgets = BudgetRecord(budget_at_start_w(setting), setting.fleet.reserve_w, parked_w)
        self.source = BudgetSource(setting, lambda now_s: self.fleet.node_j(now_s, self.died_s), self.budgets.budget)
        self.agents: dict[str, Agent] = {}
        self.managers: list[Manager] = []
        self.died_s: dict[str, float] = {}
        self._network = Network(self.events, setting.messages, random.Random(f"mail {setting.seed}"))
        offered = (zip(log.arrival_s, repeat(model), count()) for model, log in enumerate(self.fleet.logs.values()))
        self._arrivals = merge(*offered)
        self._next = next(self._arrivals, _NONE)

    def to_the_end(self) -> None:
        """Run for the setting's duration."""
        setting = self.setting
        for placed in self.fleet.placed:
            self._charge(placed, 0.0)
        if not all(model.fixed for model in setting.fleet.models):
            self._start()
        for failure in setting.failures:
            self._plan(failure)
        self.events.at(setting.interval_s, self._sample)
        self._until(setting.duration_s)
        for placed in self.fleet.placed:
            placed.engine.read(setting.duration_s)
            placed.engine.settle()
        self.budgets.pass_time(setting.duration_s)

    def follow(self) -> float:
        """Go on until every request that came before the end has its verdict; gives the time reached, s."""
        now_s = end_s = self.setting.duration_s
        while now_s < end_s + self.setting.follow_s and not self._all_judged(now_s):
            now_s = min(now_s + _FOLLOW_STEP_S, end_s + self.setting.follow_s)
            self._until(now_s)
            for placed in self.fleet.placed:
                placed.engine.advance(now_s)
        return now_s

    def _all_judged(self, now_s: float) -> bool:
        for model in self.setting.fleet.models:
            asked = self.fleet.logs[model.name].outcomes()
            good, late = asked.verdicts(model.target.slo, now_s)
            if not (good | late)[asked.arrival_s < self.setting.duration_s].all():
                return False
        return True

    def _until(self, end_s: float) -> None:
        """Make all calls and route all requests that are due by `end_s`, in the order of their times."""
        events, fleet = self.events, self.fleet
        routes = [fleet.routers[name].route for name in fleet.logs]
        while True:
            arrival_s, model, request = self._next
            until_s = min(arrival_s, end_s)
            while events.next_s <= until_s:
                events.run_next()
            if arrival_s > end_s:
                return
            routes[model](request, arrival_s)
            self._next = next(self._arrivals, _NONE)

    # -- at the start ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start manager and agents. All caps are at their lowest; the first grants are in force within 0.1 s."""
        setting = self.setting
        phases = random.Random(f"beats {setting.seed}")
        beliefs = {}
        for model in setting.fleet.models:
            gpu = find_gpu(model.gpu)
            roofline = RooflineModel(model.physics, model.workload, setting.fleet.time_scale, model.step_tokens)
            surface = model.belief or GridModel(roofline, gpu.min_limit_w, gpu.max_limit_w, model.max_batch)
            beliefs[model.name] = LoadedModel(model.name, surface)
        for placed in self.fleet.placed:
            moved = partial(self._charge, placed)
            agent = Agent(placed, beliefs[placed.model.name], setting, self.events, self._say, moved)
            self.agents[placed.spec.replica_id] = agent
            self.events.at(BEAT_S * phases.random(), agent.beat)
        manager = self._new_manager(0.0)
        manager.start(map(node_info, setting.fleet.nodes), 0.0)
        self.events.at(0.0, manager.run)

    def _new_manager(self, now_s: float) -> Manager:
        before = self.managers[-1].core.record if self.managers else FleetRecord()
        record = replace(before, epoch=before.epoch + 1)
        manager = Manager(self.setting, self._network, self.source, self.agents, record, now_s)
        self.managers.append(manager)
        return manager

    # -- while it runs ---------------------------------------------------------------------------------------------

    def _say(self, said: Hello | Beat, now_s: float) -> None:
        self._network.send(now_s, lambda at_s: self.managers[-1].hear(said, at_s))

    def _charge(self, placed: Placed, now_s: float) -> None:
        self.budgets.charge(placed.spec.replica_id, placed.terms.charge_w(placed.engine.cap.ordered_w), now_s)

    def _sample(self, now_s: float) -> None:
        if self.samples.full:
            return
        self.samples.take(now_s)
        self.targets_w.append(self.source.target_w or 0.0)
        self.charges_w.append(self.budgets.charge_w)
        self.events.at((self.samples.taken + 1) * self.setting.interval_s, self._sample)

    # -- failures --------------------------------------------------------------------------------------------------

    def _plan(self, failure: Failure) -> None:
        if failure.kind == "agent_silent":
            if failure.who not in {p.spec.replica_id for p in self.fleet.placed}:
                raise SimulationError(f"no replica {failure.who!r} that could be silent")
            self.events.at(failure.at_s, partial(self._silence, failure.who, True))
            self.events.at(failure.at_s + failure.for_s, partial(self._silence, failure.who, False))
        elif failure.kind == "manager_down":
            self.events.at(failure.at_s, self._lose_manager)
            self.events.at(failure.at_s + failure.for_s, self._replace_manager)
        else:
            if failure.who not in self.fleet.nodes:
                raise SimulationError(f"no node {failure.who!r} that could die")
            self.events.at(failure.at_s, partial(self._kill, failure.who))

    def _silence(self, replica_id: str, silent: bool, _now_s: float) -> None:
        agent = self.agents.get(replica_id)
        if agent is not None and not agent.dead:
            agent.silent = silent

    def _lose_manager(self, _now_s: float) -> None:
        if self.managers:
            self.managers[-1].down = True

    def _replace_manager(self, now_s: float) -> None:
        if self.managers:
            self._new_manager(now_s).run(now_s)

    def _kill(self, node: str, now_s: float) -> None:
        self.died_s[node] = now_s
        for placed in self.fleet.placed:
            if placed.node.name == node:
                if agent := self.agents.get(placed.spec.replica_id):
                    agent.silent = agent.dead = True
                self.fleet.routers[placed.model.name].lose(placed.engine, now_s)
        if self.managers:
            self.events.at(now_s + SILENT_S, lambda _: self.managers[-1].core.node_lost(node))
