"""The runs of one case: its capacities, every policy on every seed, and the oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path

import numpy as np

from pals_ray.config.scenario import start_batch
from pals_ray.control.budget.moving_budget import BudgetPlan, FollowedSignal
from pals_ray.control.replica.batch_choice import graph_sizes
from pals_ray.control.snapshot import Policy, Share
from pals_ray.evaluation.capacity import alone, capacity_per_s, tuned_s
from pals_ray.evaluation.cases import (
    FOLLOW_S,
    WARM_UP_S,
    Case,
    budget_of,
    even_cap_w,
    failures_of,
    fleet_of,
    full_charge_w,
    requests_for,
)
from pals_ray.evaluation.simulated_profile import profiled, prompt_share
from pals_ray.models.specs import find_gpu
from pals_ray.simulation.oracle import Tried, best_fixed
from pals_ray.simulation.results.figures import Figures, figures, share_of
from pals_ray.simulation.results.run_result import RunResult
from pals_ray.simulation.setting import SimFleet, SimSetting
from pals_ray.simulation.simulate import simulate
from pals_ray.simulation.traces import Trace
from pals_ray.types import OperatingPoint, Target
from policies import uniform

#: The seeds of a run's models begin at its seed times this.
_SEED_STRIDE = 1000

#: Models' operating points, by name.
Points = Mapping[str, OperatingPoint]


@dataclass(frozen=True)
class Run:
    """One policy on one seed."""

    seed: int
    figures: Figures
    result: RunResult


class CaseRuns:
    """All runs of one case; each is made once. `tick` is called before each.

    A model that the reference cannot serve within its limits gets no requests: it is `left_out`.
    """

    #: For so long at most requests are followed after the end, s.
    follow_s = FOLLOW_S

    def __init__(
        self,
        case: Case,
        lengths: Trace,
        folder: Path,
        seeds: Sequence[int],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.case = case
        self.fleet = fleet_of(case.scenario, case.fleet, case.limits, lengths)
        self._seeds = tuple(seeds)
        self._lengths = lengths
        self._folder = folder
        self._tick = tick
        self._run = cache(self._made)
        self._profiled_fleet = cache(self._profiled)

    # -- what is offered -------------------------------------------------------------------------------------------

    @cached_property
    def reference(self) -> Points:
        """What offered load is a share of: `static`, or the same with every GPU at its even part of the budget."""
        points, watts = self._top("static"), self.case.budget_w
        if self.case.scenario.load.of == "static" or watts is None:
            return points
        gpus = {model.name: model.gpu for model in self.fleet.models}
        return {n: replace(p, cap_w=even_cap_w(self.fleet, watts, gpus[n])) for n, p in points.items()}

    @cached_property
    def capacity_per_s(self) -> Mapping[str, float | None]:
        """Requests/s up to which each model attains its SLO at the reference; None: it cannot be served within it."""
        seeds = self.case.scenario.tuning_seeds
        self._tick()
        return {
            name: capacity_per_s(alone(self.fleet, name), point, self._lengths, seeds)
            for name, point in self.reference.items()
        }

    @property
    def left_out(self) -> list[str]:
        """The models without requests."""
        return [name for name, capacity in self.capacity_per_s.items() if capacity is None]

    @cached_property
    def rates_per_s(self) -> dict[str, float]:
        """The mean requests/s that are offered to each model."""
        known = self.capacity_per_s.items()
        return {name: (self.case.load or 1.0) * capacity for name, capacity in known if capacity is not None}

    @cached_property
    def duration_s(self) -> float:
        """How long each run is judged, s: longer than the case says where too few requests would be judged else."""
        least = self.case.scenario.least_requests / min(self.rates_per_s.values()) / len(self._seeds)
        return max(self.case.duration_s, round(least))

    def requests(self, seed: int, judged_s: float) -> dict[str, Trace]:
        """The requests of every model, the same for all policies."""
        case, offered = self.case, dict[str, Trace]()
        for number, (name, rate) in enumerate(self.rates_per_s.items()):
            offered[name] = requests_for(
                case.scenario.load,
                case.scenario.trace.arrivals,
                self._lengths,
                rate,
                WARM_UP_S + judged_s,
                _SEED_STRIDE * seed + number,
                prompt_share(self.fleet.model(name), self.reference[name]),
                case.demand,
            )
        return offered

    # -- runs ------------------------------------------------------------------------------------------------------

    def run(self, policy: str, seed: int) -> Run:
        """One policy on one seed."""
        return self._run(policy, seed)

    def _made(self, policy: str, seed: int) -> Run:
        top = self._top(policy)
        if policy.partition("@")[0] == "static":
            found = self.fixed(top, seed)
            return _judged(seed, found.result, self._budget(seed, found)[1])
        fleet = self._profiled_fleet(tuple(point.batch_limit for point in top.values()))
        budget_w, plan = self._budget(seed, self.run("static", seed))
        setting = replace(self._setting(fleet, seed), policy=policy_named(policy), budget_w=budget_w, plan=plan)
        return _judged(seed, self._simulated(setting), plan)

    def fixed(self, points: Points, seed: int, judged_s: float | None = None) -> Run:
        """Every model's replicas at one point throughout, without a budget."""
        fleet = fixed_at(replace(self.fleet, domains=()), points)
        return _judged(seed, self._simulated(self._setting(fleet, seed, judged_s)))

    def oracles(self) -> dict[str, tuple[OperatingPoint, list[Run]]]:
        """By name, the best fixed point of the fleet's one model, and its runs: the one with the most tokens/J of those
        that attain its SLO on the tuning seeds."""
        (model,) = self.fleet.models
        seeds = self.case.scenario.tuning_seeds
        judged_s = tuned_s(self.rates_per_s[model.name], len(seeds))

        def try_at(point: OperatingPoint) -> Tried:
            runs = [self.fixed({model.name: point}, seed, judged_s) for seed in seeds]
            attainment = pooled_attainment([run.figures for run in runs])
            attains = attainment is not None and attainment >= model.target.slo.attainment
            most = max(float(replica.running.max()) for run in runs for replica in run.result.replicas)
            return Tried(point, attains, _efficiency(runs), most)

        return {"oracle": self._or_static(best_fixed(try_at, self._oracle_caps_w(), graph_sizes(model.max_batch)))}

    def _or_static(self, found: Tried | None) -> tuple[OperatingPoint, list[Run]]:
        """A point that was found and its runs; `static`'s where these are no better."""
        (model,) = self.fleet.models
        static = [self.run("static", seed) for seed in self._seeds]
        if found is not None:
            runs = [self.fixed({model.name: found.point}, seed) for seed in self._seeds]
            if _efficiency(runs) > _efficiency(static):
                return found.point, runs
        return self._top("static")[model.name], static

    def _oracle_caps_w(self) -> list[float]:
        gpu, step_w = find_gpu(self.fleet.models[0].gpu), self.case.scenario.oracle_step_w
        return [float(w) for w in range(round(gpu.min_limit_w), round(gpu.max_limit_w) + 1, step_w)]

    # -- inside ----------------------------------------------------------------------------------------------------

    def _top(self, policy: str) -> dict[str, OperatingPoint]:
        """The highest cap, and the batch limit that a policy's engines start at."""
        models = self.fleet.models
        return {m.name: OperatingPoint(find_gpu(m.gpu).max_limit_w, start_batch(policy, m.max_batch)) for m in models}

    def _profiled(self, batches: tuple[int, ...]) -> SimFleet:
        """The fleet with the models' engines started at these batches, and what controllers know of them beforehand."""
        models = []
        for model, batch in zip(self.fleet.models, batches, strict=True):
            started = replace(model, max_batch=batch)
            self._tick()
            models.append(replace(started, belief=profiled(replace(started, target=Target()), self._lengths)))
        return replace(self.fleet, models=tuple(models))

    def _budget(self, seed: int, static: Run) -> tuple[float, BudgetPlan | None]:
        """The case's budget, W at node level, and the plan that moves it, where `static` draws what it does."""
        return budget_of(self.case, self.fleet, self._folder, static.figures["power_w"], seed)

    def _simulated(self, setting: SimSetting) -> RunResult:
        """A run with the scenario's failures."""
        self._tick()
        setting = replace(setting, failures=failures_of(self.case.scenario.failures))
        return simulate(setting, self.requests(setting.seed, setting.duration_s - WARM_UP_S))

    def _setting(self, fleet: SimFleet, seed: int, judged_s: float | None = None) -> SimSetting:
        """A run under a budget that never binds."""
        duration_s = WARM_UP_S + (judged_s or self.duration_s)
        return SimSetting(fleet, full_charge_w(fleet), uniform.allocate, duration_s, seed=seed, follow_s=self.follow_s)


def _judged(seed: int, result: RunResult, plan: BudgetPlan | None = None) -> Run:
    followed = plan if isinstance(plan, FollowedSignal) else None
    return Run(seed, figures(result, WARM_UP_S, followed), result)


def fixed_at(fleet: SimFleet, points: Points) -> SimFleet:
    """The fleet with every model's replicas at one point throughout."""
    return replace(fleet, models=tuple(replace(model, fixed=points[model.name]) for model in fleet.models))


def policy_named(name: str) -> Policy:
    """The policy function that a scenario's name means: that of `power_only@64` is `power_only`'s."""
    allocate: Callable[..., Mapping[str, Share]] = import_module(f"policies.{name.partition('@')[0]}").allocate
    return allocate


def pooled_attainment(runs: Sequence[Figures]) -> float | None:
    """The attainment of all requests of several runs."""
    return share_of(sum(run["good_requests"] for run in runs), sum(run["late_requests"] for run in runs))


def _efficiency(runs: Sequence[Run]) -> float:
    return float(np.mean([run.figures["tokens_per_joule"] for run in runs]))
