"""The runs of one case: the reference, latency limits from it, every policy on every seed, and the oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib import import_module
from pathlib import Path

import numpy as np

from pals_ray.control.budget.moving_budget import BudgetPlan, FollowedSignal
from pals_ray.control.snapshot import Policy, Share
from pals_ray.evaluation.cases import (
    SATURATION,
    WARM_UP_S,
    Case,
    budget_of,
    even_cap_w,
    failures_of,
    fleet_of,
    full_charge_w,
    requests_for,
)
from pals_ray.evaluation.simulated_profile import full_tokens_per_s, profiled, prompt_share, roofline
from pals_ray.models.specs import find_gpu
from pals_ray.simulation.oracle import candidates, steady_state
from pals_ray.simulation.results.figures import Figures, counts_as_gain, figures, model_figures
from pals_ray.simulation.results.run_result import RunResult
from pals_ray.simulation.setting import SimFleet, SimSetting
from pals_ray.simulation.simulate import simulate
from pals_ray.simulation.traces import Trace
from pals_ray.types import OperatingPoint, Target
from policies import uniform

#: How long requests that never run out are offered to find what a fleet serves, and the part of it that is not
#: counted: the longest outputs must have come and gone, s.
SATURATED_S, FILLING_S = 240.0, 120.0
#: Batch limits that `power_only_best` is tuned over, up to the start batch.
TUNED_BATCHES = (8, 16, 32, 48, 64, 128, 256)
#: How many of the oracle's points are confirmed in the simulator.
CONFIRMED = 5
#: The seeds of a run's models begin at its seed times this.
_SEED_STRIDE = 1000


@dataclass(frozen=True)
class Run:
    """One policy on one seed."""

    seed: int
    figures: Figures
    result: RunResult


class CaseRuns:
    """All runs of one case; each is made once. `tick` is called before each.

    `requests` and `limited` remember by seed what `_requests` and `_limited` give.
    """

    def __init__(self, case: Case, lengths: Trace, folder: Path, tick: Callable[[], None] = lambda: None) -> None:
        self.case = case
        fleet = fleet_of(case.scenario, case.fleet, lengths)
        tick()
        models = tuple(replace(model, belief=profiled(model, lengths)) for model in fleet.models)
        self.fleet = replace(fleet, models=models)
        models_at = {model.name: model for model in models}
        self._top = {n: OperatingPoint(find_gpu(m.gpu).max_limit_w, m.max_batch) for n, m in models_at.items()}
        # What offered load is a share of: `static`, or every GPU at its even part of the budget.
        watts, self._reference = case.scenario.budget.watts, self._top
        if case.scenario.load.of != "static" and watts is not None:
            even = {n: even_cap_w(fleet, watts, m.gpu) for n, m in models_at.items()}
            self._reference = {n: replace(point, cap_w=even[n]) for n, point in self._top.items()}
        self._lengths = lengths
        self._folder = folder
        self._tick = tick
        self.requests = cache(self._requests)
        self.limited = cache(self._limited)
        #: By seed: everything at maximum, whatever the budget.
        self.static = cache(lambda seed: self.fixed(self._top, seed))
        self._run = cache(self._made)

    @cached_property
    def capacity_tokens_per_s(self) -> dict[str, float]:
        """Output tokens/s that each model serves at the reference's fixed point when requests never run out."""
        fleet, offered = fixed_at(self.fleet, self._reference), {}
        for number, model in enumerate(fleet.models):
            replicas = sum(node.replicas.count(model.name) for node in fleet.nodes)
            rate = SATURATION * replicas * full_tokens_per_s(model, self._reference[model.name])
            offered[model.name] = self._poisson(rate, SATURATED_S, number)
        self._tick()
        result = simulate(self._setting(fleet, uniform.allocate, 0, SATURATED_S), offered)
        counted = result.time_s > FILLING_S
        capacity = dict.fromkeys(offered, 0.0)
        for found in result.replicas:
            capacity[found.model] += float(np.mean(found.tokens_per_s[counted]))
        return capacity

    def _requests(self, seed: int) -> dict[str, Trace]:
        """The requests of every model, the same for all policies."""
        case, offered = self.case, dict[str, Trace]()
        for number, (name, served) in enumerate(self.capacity_tokens_per_s.items()):
            own_seed = _SEED_STRIDE * seed + number
            if case.load is None:
                offered[name] = self._poisson(SATURATION * served, case.simulated_s, own_seed)
                continue
            share = prompt_share(self.fleet.model(name), self._reference[name])
            arrivals, rate = case.scenario.trace.arrivals, case.load * served
            offered[name] = requests_for(
                case.scenario.load, arrivals, self._lengths, rate, case.simulated_s, own_seed, share
            )
        return offered

    def _limited(self, seed: int) -> tuple[SimFleet, float, float, BudgetPlan | None]:
        """The fleet with the latency limits that `static` sets at this demand; what that draws and the budget, W at
        node level; and the plan that moves the budget.

        A saturated run has no latency limits: its queue grows for ever.
        """
        self._tick()
        fleet = fixed_at(replace(self.fleet, domains=()), self._top)
        result = simulate(self._setting(fleet, uniform.allocate, seed), self.requests(seed))
        found, limits = model_figures(result, WARM_UP_S), self.case.scenario.limits
        models = []
        for model in self.fleet.models:
            ttft_s, itl_s = found[model.name]["ttft_p99_s"], found[model.name]["itl_p99_s"]
            if self.case.load is not None and ttft_s is not None and itl_s is not None:
                ttft_s, itl_s = limits.ttft_p99 * ttft_s, limits.itl_p99 * itl_s
                model = replace(model, target=replace(model.target, ttft_p99_s=ttft_s, itl_p99_s=itl_s))
            models.append(model)
        natural_w = result.node_energy_j / result.duration_s
        budget_w, plan = budget_of(self.case, self.fleet, self._folder, natural_w, seed)
        return replace(self.fleet, models=tuple(models)), natural_w, budget_w, plan

    def run(self, policy: str, seed: int) -> Run:
        """One policy on one seed. `power_only_best` is tuned first, on the scenario's tuning seeds."""
        if policy == "static":
            return self.static(seed)
        return self._run(self.best_power_only() if policy == "power_only_best" else policy, seed)

    def fixed(self, points: dict[str, OperatingPoint], seed: int) -> Run:
        """Every model's replicas at one point throughout, without a budget."""
        fleet, _, _, plan = self.limited(seed)
        setting = self._setting(fixed_at(replace(fleet, domains=()), points), uniform.allocate, seed)
        return self._simulated(setting, plan)

    def best_power_only(self) -> str:
        """`power_only@BATCH` of the batch that keeps the limits best on the tuning seeds, then gains most tokens/J.

        Plain `power_only` where that is the start batch: its runs are there already.
        """
        start = max(model.max_batch for model in self.fleet.models)
        scenario = self.case.scenario

        def worth(batch: int) -> tuple[bool, float]:
            runs = [self._run(f"power_only@{batch}", seed) for seed in scenario.tuning_seeds]
            rate = float(np.mean([run.figures["violation_rate"] or 0.0 for run in runs]))
            own = float(np.mean([self.static(s).figures["violation_rate"] or 0.0 for s in scenario.tuning_seeds]))
            kept = counts_as_gain(rate, own, scenario.violation_limit)
            return kept, float(np.mean([run.figures["tokens_per_joule"] for run in runs])) if kept else -rate

        best = max((b for b in TUNED_BATCHES if b <= start), key=worth)
        return "power_only" if best == start else f"power_only@{best}"

    def oracle(self) -> tuple[OperatingPoint, list[Run]]:
        """The best fixed point of the fleet's one model that keeps the limits, and its runs.

        The best points by the steady-state physics are confirmed on every seed in the simulator, which has queues and
        bursts; of one that fails there, the lowest higher cap that does not is taken. `static` is always a candidate.
        """
        (model,) = self.fleet.models
        node = self.fleet.nodes[0]
        replicas = sum(n.replicas.count(model.name) for n in self.fleet.nodes)
        demand = (self.case.load or 0.0) * self.capacity_tokens_per_s[model.name] / replicas
        top, limits = self._top[model.name], self.case.scenario.limits
        at_top = steady_state(roofline(model), top, demand)
        ttft_s, itl_s = limits.ttft_p99 * at_top.ttft_p99_s, limits.itl_p99 * at_top.itl_p99_s
        target = Target(ttft_p99_s=ttft_s, itl_p99_s=itl_s)
        best = top, [self.static(seed) for seed in self.case.scenario.seeds]
        found = candidates(roofline(model), model.max_batch, demand, target, node.overhead, node.num_gpus)
        for _, point in found[:CONFIRMED]:
            best = self._confirmed(point, _efficiency(best[1])) or best
        return best

    def _confirmed(self, point: OperatingPoint, beat: float) -> tuple[OperatingPoint, list[Run]] | None:
        """The lowest cap in whole W, from the point's own up, at which its runs count; None where that is not better
        than `beat` tokens/J. A higher cap at the same batch only costs more, so none above one that is not is tried."""
        (model,) = self.fleet.models
        kept = None
        low, high = round(point.cap_w), round(find_gpu(model.gpu).max_limit_w)
        cap_w = low
        while low <= high:
            at = OperatingPoint(float(cap_w), point.batch_limit)
            runs = [self.fixed({model.name: at}, seed) for seed in self.case.scenario.seeds]
            if _efficiency(runs) <= beat:
                high = cap_w - 1
            elif all(self.counts(run) for run in runs):
                kept, high = (at, runs), cap_w - 1
            else:
                low = cap_w + 1
            cap_w = (low + high) // 2
        return kept

    def counts(self, run: Run) -> bool:
        """Whether a run's violations are few enough for its gain to count."""
        own = self.static(run.seed).figures["violation_rate"]
        return counts_as_gain(run.figures["violation_rate"], own, self.case.scenario.violation_limit)

    def _made(self, policy: str, seed: int) -> Run:
        fleet, _, budget_w, plan = self.limited(seed)
        setting = replace(self._setting(fleet, policy_named(policy), seed), budget_w=budget_w, plan=plan)
        return self._simulated(setting, plan)

    def _simulated(self, setting: SimSetting, plan: BudgetPlan | None) -> Run:
        """A run with the scenario's failures, judged by the case's budget plan."""
        self._tick()
        setting = replace(setting, failures=failures_of(self.case.scenario.failures))
        result = simulate(setting, self.requests(setting.seed))
        found = figures(result, WARM_UP_S, plan if isinstance(plan, FollowedSignal) else None)
        return Run(setting.seed, found, result)

    def _setting(self, fleet: SimFleet, policy: Policy, seed: int, duration_s: float | None = None) -> SimSetting:
        """A run under a budget that never binds."""
        return SimSetting(fleet, full_charge_w(fleet), policy, duration_s or self.case.simulated_s, seed=seed)

    def _poisson(self, tokens_per_s: float, duration_s: float, seed: int) -> Trace:
        return requests_for(self.case.scenario.load, "poisson", self._lengths, tokens_per_s, duration_s, seed)


def fixed_at(fleet: SimFleet, points: dict[str, OperatingPoint]) -> SimFleet:
    """The fleet with every model's replicas at one point throughout."""
    return replace(fleet, models=tuple(replace(model, fixed=points[model.name]) for model in fleet.models))


def policy_named(name: str) -> Policy:
    """The policy function that a scenario's name means: `power_only@32` is that of batch 32."""
    module, _, batch = name.partition("@")
    allocate: Callable[..., Mapping[str, Share]] = import_module(f"policies.{module}").allocate
    return partial(allocate, batch_limit=int(batch)) if batch else allocate


def _efficiency(runs: list[Run]) -> float:
    return float(np.mean([run.figures["tokens_per_joule"] for run in runs]))
