"""From a scenario to cases: one fleet under one load and one kind of budget, with every policy and seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np

from pals_ray.config.budget_files import load_signal
from pals_ray.config.scenario import Demand, FailureSpec, FleetSpec, LengthSpec, LoadSpec, Scenario
from pals_ray.config.trace_files import load_trace
from pals_ray.control.budget.moving_budget import BudgetPlan, FollowedSignal
from pals_ray.control.budget.regulation import synthetic_signal
from pals_ray.control.budget.schedule import Entry, Schedule
from pals_ray.control.budget.signal_following import Following
from pals_ray.control.snapshot import Overhead
from pals_ray.models.physics.roofline import Workload
from pals_ray.models.specs import Parallelism, find_gpu, find_model
from pals_ray.simulation.setting import Failure, SimFleet, SimModel, SimNode
from pals_ray.simulation.traces import (
    Trace,
    bursts,
    clipped,
    continued,
    diurnal,
    lengthened,
    poisson,
    ramped,
    resampled,
)
from pals_ray.types import Slo

#: Time in which engines fill and controllers find their first points; not counted, s.
WARM_UP_S = 120.0
#: For so long requests are followed after the end, while the load goes on, until each has its verdict, s.
FOLLOW_S = 600.0
#: The set of limits of models without SLOs.
NO_LIMITS = "none"
#: Load at which requests never run out, as a multiple of what is expected to be served.
SATURATION = 1.5

#: Lengths without a trace are so many.
_DRAWN = 4096

BudgetKind = Literal["constant", "event", "regulation"]


@dataclass(frozen=True)
class Case:
    """One fleet with one set of limits under one load and one budget.

    `load` is a share of capacity (None: a closed loop), `target` the share of it that models are to serve (None: they
    have SLOs), `demand` says whether all models have their peaks together. The budget is `budget_w`
    (None: what the fleet is charged at its highest caps) times `budget_share`. `duration_s`, at least so long, is
    without the warm-up.
    """

    scenario: Scenario
    fleet: FleetSpec
    limits: str
    load: float | None
    target: float | None
    demand: Demand
    kind: BudgetKind
    budget_w: float | None
    budget_share: float
    duration_s: float

    @property
    def budget(self) -> str:
        """The budget in a word."""
        if self.kind != "constant":
            return self.kind
        return f"{self.budget_w:g} W" if self.budget_w is not None else f"budget {self.budget_share:g}"

    @property
    def name(self) -> str:
        """Unique within the scenario."""
        demand = " together" if self.demand == "together" else ""
        load = "closed loop" if self.load is None else f"load {self.load:g}{demand}"
        aim = self.limits if self.target is None else f"target {self.target:g}"
        return f"{self.fleet.name}, {aim}, {load}, {self.budget}"

    @property
    def kinds_of_models(self) -> str:
        """`dense`, `moe`, or `mixed`."""
        moe = {find_model(model.name).is_moe for model in self.fleet.models}
        return "mixed" if len(moe) > 1 else "moe" if moe.pop() else "dense"


def cases_of(scenario: Scenario) -> list[Case]:
    """Every case: each fleet with each set of limits, each load and each budget."""
    spec, load, duration_s = scenario.budget, scenario.load, scenario.duration_s
    first_w = spec.watts[0] if spec.watts else None
    budgets: list[tuple[BudgetKind, float | None, float, float]] = []
    if spec.regulation is not None:
        budgets.append(("regulation", first_w, 1.0, duration_s))
    if spec.event is not None:
        budgets.append(("event", first_w, 1.0, duration_s))
    budgets += [("constant", first_w, share, spec.sweep_s or duration_s) for share in spec.shares]
    if not budgets:
        budgets += [("constant", watts, 1.0, duration_s) for watts in spec.watts or (None,)]
    aims: list[tuple[str, float | None]] = [(NO_LIMITS, share) for share in load.targets]
    aims = aims or [(name, None) for name in scenario.limits]
    loads = (None,) if load.closed else load.shares
    return [
        Case(scenario, fleet, limits, share, target, demand, kind, watts, budget_share, length_s)
        for fleet, (limits, target), demand in product(scenario.fleets, aims, load.demands)
        for share, (kind, watts, budget_share, length_s) in product(loads, budgets)
        if demand == "own" or watts == first_w
    ]


def read_lengths(scenario: Scenario, folder: Path, sample: bool) -> Trace:
    """The scenario's trace, clipped to its context; `sample` takes the small synthetic file that is shipped.

    Raises `MissingTrace` where the file is not there.
    """
    spec = scenario.trace
    trace = load_trace(folder / (spec.sample if sample else spec.path), spec.format)
    return clipped(lengthened(trace, spec.length_factor), spec.max_model_len)


def drawn_lengths(spec: LengthSpec) -> Trace:
    """Requests of these lengths, without arrivals of their own."""
    generator = np.random.default_rng(0)
    prompts, outputs = (
        generator.integers(*ends, _DRAWN, endpoint=True) for ends in (spec.prompt_tokens, spec.output_tokens)
    )
    return Trace(np.zeros(_DRAWN), prompts, outputs, 1.0)


def fleet_of(scenario: Scenario, spec: FleetSpec, limits: str, lengths: Trace) -> SimFleet:
    """The simulator's fleet, with one of the scenario's sets of limits."""
    slo_of = scenario.limits[limits].slo_of if limits != NO_LIMITS else lambda _: Slo()
    workload = Workload(float(lengths.prompt_tokens.mean()), float(lengths.output_tokens.mean()))
    gpu_of = {name: node.gpu for node in spec.nodes for name in node.models}
    models = tuple(
        SimModel(
            name=model.name,
            spec=model.name,
            gpu=gpu_of[model.name],
            parallelism=Parallelism(model.tensor_parallel, model.expert_parallel),
            max_batch=model.max_batch,
            step_tokens=step_tokens(gpu_of[model.name]),
            workload=workload,
            target=replace(model.target.target(), slo=slo_of(model)),
        )
        for model in spec.models
    )
    return SimFleet(tuple(_nodes(scenario, spec)), models, tuple(domain.domain() for domain in spec.domains))


def step_tokens(gpu: str) -> int:
    """vLLM 0.29's default of `max_num_batched_tokens` for a server on this GPU (`EngineArgs`, by memory and name)."""
    spec = find_gpu(gpu)
    if spec.memory_bytes >= 160 * 2**30:
        return 16_384
    return 8192 if spec.memory_bytes >= 70 * 2**30 and not gpu.startswith("A100") else 2048


def _nodes(scenario: Scenario, spec: FleetSpec) -> Iterator[SimNode]:
    each = (node for node in spec.nodes for _ in range(node.count))
    for number, node in enumerate(each, start=1):
        overhead = Overhead(scenario.overhead.a_w * node.gpus / scenario.overhead.gpus, scenario.overhead.b)
        yield SimNode(f"node-{number}", node.gpu, node.gpus, node.models, node.domain, overhead)


def full_charge_w(fleet: SimFleet) -> float:
    """What the fleet is charged with every GPU at its highest cap, W."""
    return sum(
        node.overhead.charge_w(node.num_gpus * find_gpu(node.gpu).max_limit_w, node.num_gpus, node.num_gpus)
        for node in fleet.nodes
    )


def even_cap_w(fleet: SimFleet, budget_w: float, gpu: str) -> float:
    """The cap of every GPU where a budget is split evenly by GPU, overhead inside, within the device's range, W."""
    gpus = sum(node.num_gpus for node in fleet.nodes)
    fixed_w = sum(node.overhead.a_w for node in fleet.nodes)
    spec = find_gpu(gpu)
    cap_w = (budget_w - fixed_w) / gpus / (1.0 + fleet.nodes[0].overhead.b)
    return min(max(cap_w, spec.min_limit_w), spec.max_limit_w)


def requests_for(
    load: LoadSpec,
    arrivals: str,
    lengths: Trace,
    requests_per_s: float,
    duration_s: float,
    seed: int,
    prompt_share: float = 0.0,
    demand: Demand = "own",
) -> Trace:
    """Requests of one model past the ramp, arriving as the scenario says; they go on for `FOLLOW_S` after the end.

    A trace's own lengths drift: over its parts the load is that of its mean lengths in work (`Trace.work`).
    """
    if arrivals == "trace":
        own_start = demand == "own"
        trace = resampled(lengths, requests_per_s, duration_s, seed, load.peak_over_mean, prompt_share, own_start)
    elif arrivals == "diurnal":
        trace = diurnal(lengths, requests_per_s, duration_s, seed, period_s=duration_s)
    else:
        trace = {"bursts": bursts, "poisson": poisson}[arrivals](lengths, requests_per_s, duration_s, seed)
    return ramped(continued(trace, FOLLOW_S), load.ramp_s, seed)


def failures_of(specs: tuple[FailureSpec, ...]) -> tuple[Failure, ...]:
    """The simulator's failures; their times count from the end of the warm-up."""
    return tuple(Failure(spec.kind, WARM_UP_S + spec.at_s, spec.for_s or 0.0, spec.who or "") for spec in specs)


def budget_of(
    case: Case, fleet: SimFleet, folder: Path, natural_w: float, seed: int
) -> tuple[float, BudgetPlan | None]:
    """The case's budget and the plan that moves it. `natural_w` is what `static` draws at the same demand. W at node
    level."""
    spec = case.scenario.budget
    base_w = case.budget_w if case.budget_w is not None else full_charge_w(fleet)
    if spec.regulation is not None:
        base_share, range_share = spec.regulation.base_share, spec.regulation.range_share
        following = Following(base_share * natural_w, range_share * natural_w, ceiling_w=full_charge_w(fleet))
        file = spec.regulation.signal
        signal = synthetic_signal(case.scenario.duration_s, seed) if file is None else load_signal(folder / file)
        time_s = tuple((signal.time_s + WARM_UP_S).tolist())
        plan = FollowedSignal(following, time_s, tuple(signal.value.tolist()), started_s=0.0)
        return following.base_w, plan
    if case.kind == "event" and spec.event is not None:
        event = spec.event
        entry = Entry(WARM_UP_S + event.start_s, WARM_UP_S + event.end_s, event.share * base_w, event.ramp_s)
        return base_w, Schedule((entry,))
    return case.budget_share * base_w, None
