"""One simulated run: fleet, manager and agents on a virtual clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import inf

import numpy as np

from pals_ray.control.agent.agent_core import BEAT_S
from pals_ray.control.manager.fleet_record import FleetRecord
from pals_ray.control.manager.silent_agents import SILENT_S
from pals_ray.control.messages import Beat, Hello
from pals_ray.models.grid import GridModel
from pals_ray.models.lookup import LoadedModel
from pals_ray.models.physics.roofline import RooflineModel
from pals_ray.models.power_model import PowerModel
from pals_ray.models.specs import find_gpu
from pals_ray.simulation.agent import Agent
from pals_ray.simulation.budget import BudgetSource
from pals_ray.simulation.clock import Events, Mail
from pals_ray.simulation.fleet import Fleet, Placed, build
from pals_ray.simulation.manager import Manager
from pals_ray.simulation.recorder import QOS_LOOK_S, BudgetRecord, ModelQos, Samples
from pals_ray.simulation.setting import (
    AgentSilent,
    Failure,
    ManagerDown,
    NodeDeath,
    Offered,
    SimModel,
    SimSetting,
    SimulationError,
)

#: Requests are turned into Python numbers so many at a time.
_CHUNK = 100_000

#: When a request comes, who takes it, and its index.
_Route = tuple[float, Callable[[int, float], None], int]
_NEVER: _Route = (inf, lambda _request, _now_s: None, -1)


class Run:
    """All that takes part in one run."""

    def __init__(self, setting: SimSetting, requests: Offered) -> None:
        fixed = [model.fixed is not None for model in setting.fleet.models]
        if any(fixed) and not all(fixed):
            raise SimulationError("either all models stay at a fixed point, or none: a budget cannot hold half a fleet")
        self.setting = setting
        self.fleet: Fleet = build(setting, requests)
        self.events = Events()
        self.source = BudgetSource(setting.budget, self._drawn_j)
        self.samples = Samples(
            [p.engine for p in self.fleet.placed],
            setting.interval_s,
            int(setting.duration_s / setting.interval_s + 1e-9),
        )
        self.targets_w: list[float] = []
        self.charges_w: list[float] = []
        self.qos = {
            model.name: ModelQos(
                model.target, {p.replica_id: p.engine for p in self.fleet.placed if p.model.name == model.name}
            )
            for model in setting.fleet.models
        }
        self.budgets = BudgetRecord(
            self.source.budget_w, setting.fleet.reserve_w, sum(map(self.fleet.parked_charge_w, setting.fleet.nodes))
        )
        self.source.moved = self.budgets.budget
        self.agents: dict[str, Agent] = {}
        self.managers: list[Manager] = []
        self.died_s: dict[str, float] = {}
        self._mail = Mail(self.events, setting.messages, random.Random(f"mail {setting.seed}"))
        self._routes = _merged(self.fleet, requests)

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
        self.events.at(QOS_LOOK_S, self._look)
        self._until(setting.duration_s)
        for placed in self.fleet.placed:
            placed.engine.read(setting.duration_s)
            placed.engine.settle()
        self.budgets.finish(setting.duration_s)

    def _until(self, end_s: float) -> None:
        events, routes = self.events, self._routes
        arrival_s, route, request = next(routes, _NEVER)
        while True:
            if events.next_s <= arrival_s:
                if events.next_s > end_s:
                    return
                events.run_next()
            elif arrival_s > end_s:
                return
            else:
                route(request, arrival_s)
                arrival_s, route, request = next(routes, _NEVER)

    # -- at the start ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Manager and agents. All caps are at their lowest; the first grants are in force within 0.1 s."""
        setting = self.setting
        phases = random.Random(f"beats {setting.seed}")
        beliefs = {
            model.name: LoadedModel(model.name, _belief(model, setting.fleet.time_scale))
            for model in setting.fleet.models
        }
        for placed in self.fleet.placed:
            moved = partial(self._charge, placed)
            agent = Agent(placed, beliefs[placed.model.name], setting, self.events, self._say, moved)
            self.agents[placed.replica_id] = agent
            self.events.at(BEAT_S * phases.random(), agent.beat)
        manager = self._new_manager(0.0)
        manager.start(self.fleet.nodes.values(), 0.0)
        self.events.at(0.0, manager.run)

    def _new_manager(self, now_s: float) -> Manager:
        before = self.managers[-1].core.record if self.managers else FleetRecord()
        record = replace(before, epoch=before.epoch + 1)
        manager = Manager(self.setting, self._mail, self.source, self.agents, record, now_s)
        self.managers.append(manager)
        return manager

    # -- what goes on ----------------------------------------------------------------------------------------------

    def _say(self, said: Hello | Beat, now_s: float) -> None:
        self._mail.send(now_s, lambda at_s: self.managers[-1].hear(said, at_s))

    def _charge(self, placed: Placed, now_s: float) -> None:
        self.budgets.charge(placed.replica_id, placed.terms.charge_w(placed.engine.cap.ordered_w), now_s)

    def _drawn_j(self, now_s: float) -> float:
        """What the fleet has drawn so far at node level, J, as its energy counters say."""
        return self.fleet.node_j(now_s, self.died_s)

    def _sample(self, now_s: float) -> None:
        self.samples.take(now_s)
        self.targets_w.append(self.source.target_w or 0.0)
        self.charges_w.append(self.budgets.charge_w)
        self.events.at((self.samples.taken + 1) * self.setting.interval_s, self._sample)

    def _look(self, now_s: float) -> None:
        for account in self.qos.values():
            account.look(now_s)
        self.events.at(now_s + QOS_LOOK_S, self._look)

    # -- failures --------------------------------------------------------------------------------------------------

    def _plan(self, failure: Failure) -> None:
        if isinstance(failure, AgentSilent):
            if failure.replica_id not in {p.replica_id for p in self.fleet.placed}:
                raise SimulationError(f"no replica {failure.replica_id!r} that could be silent")
            self.events.at(failure.at_s, partial(self._silence, failure.replica_id, True))
            self.events.at(failure.at_s + failure.for_s, partial(self._silence, failure.replica_id, False))
        elif isinstance(failure, ManagerDown):
            self.events.at(failure.at_s, self._lose_manager)
            self.events.at(failure.at_s + failure.for_s, self._replace_manager)
        else:
            if failure.node not in self.fleet.nodes:
                raise SimulationError(f"no node {failure.node!r} that could die")
            self.events.at(failure.at_s, partial(self._kill, failure))

    def _silence(self, replica_id: str, silent: bool, _now_s: float) -> None:
        if replica_id in self.agents and self.agents[replica_id].spec.node_id not in self.died_s:
            self.agents[replica_id].silent = silent

    def _lose_manager(self, _now_s: float) -> None:
        if self.managers:
            self.managers[-1].down = True

    def _replace_manager(self, now_s: float) -> None:
        if self.managers:
            self._new_manager(now_s).run(now_s)

    def _kill(self, death: NodeDeath, now_s: float) -> None:
        self.died_s[death.node] = now_s
        for placed in self.fleet.placed:
            if placed.node.name == death.node:
                if placed.replica_id in self.agents:
                    agent = self.agents[placed.replica_id]
                    agent.silent = agent.dead = True
                self.fleet.routers[placed.model.name].lose(placed.engine, now_s)
        if self.managers:
            self.events.at(now_s + SILENT_S, lambda _: self.managers[-1].core.node_lost(death.node))


def _belief(model: SimModel, time_scale: float) -> PowerModel:
    """What manager and agents take the model for."""
    if model.belief is not None:
        return model.belief
    gpu = find_gpu(model.gpu)
    roofline = RooflineModel(model.physics, model.workload, time_scale, model.step_tokens)
    return GridModel(roofline, gpu.min_limit_w, gpu.max_limit_w, model.max_batch)


def _merged(fleet: Fleet, offered: Offered) -> Iterator[_Route]:
    """All requests by time; of those at the same time the first model's first."""
    names = [name for name, requests in offered.items() if len(requests)]
    if not names:
        return
    arrival_s = np.concatenate([offered[name].arrival_s for name in names])
    whose = np.concatenate([np.full(len(offered[name]), i) for i, name in enumerate(names)])
    request = np.concatenate([np.arange(len(offered[name])) for name in names])
    routes = [fleet.routers[name].route for name in names]
    order = np.argsort(arrival_s, kind="stable")
    for start in range(0, len(order), _CHUNK):
        part = order[start : start + _CHUNK]
        for at_s, model, index in zip(
            arrival_s[part].tolist(), whose[part].tolist(), request[part].tolist(), strict=True
        ):
            yield at_s, routes[model], index
