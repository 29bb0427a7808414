"""The same short scenario on a live fleet and in the simulator: the fleet's simulated twin, the same requests for both,
and how far apart their figures are. `pals validate-simulation` runs the live side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pals_ray.config.fleet import FleetConfig
from pals_ray.config.policy_path import load_policy
from pals_ray.control.budget.schedule import Entry, Schedule
from pals_ray.control.telemetry import Reading, between
from pals_ray.engine.control_block import SchedulerReading
from pals_ray.evaluation.runs import fixed_at
from pals_ray.models.physics.roofline import RooflineModel, Workload
from pals_ray.models.specs import Parallelism, find_gpu
from pals_ray.runtime.manager.predictors import Predictors
from pals_ray.simulation.results.figures import share_of
from pals_ray.simulation.run import Run
from pals_ray.simulation.setting import SimFleet, SimModel, SimNode, SimSetting
from pals_ray.simulation.traces import Trace, poisson
from pals_ray.types import OperatingPoint, ReplicaTelemetry

#: What is compared, and how far the simulator may be off, as a share of the live figure.
LIMITS = {"tokens_per_s": 0.10, "power_w": 0.10, "itl_p50_s": 0.15, "tpot_p50_s": 0.15}
#: How far apart the attainment of all windows together may be.
ATTAINMENT_LIMIT = 0.01
#: Nothing is compared for so long after a load has begun or the budget has fallen, s.
SETTLE_S = 12.0
#: Where the policy is to decide, the load first goes on for so long, s: then the controllers of both sides know it.
KNOWN_S = 90.0
#: The simulated fleet is idle for so long before its load begins, as the live one is, s.
LEAD_S = 10.0

#: Readings of every model at one instant; requests of every model.
Readings = Mapping[str, Reading]
Traces = Mapping[str, Trace]
#: One model over one window, live and simulated: the JSON object that is shown of it.
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class HeldPoint:
    """Every replica is held at a point. `load` is the offered share of what the roofline says is served there: above 1
    requests queue and the batch is full, below 1 everything offered is served."""

    point: OperatingPoint
    load: float
    settle_s = SETTLE_S

    @property
    def windows(self) -> tuple[str, ...]:
        """What is compared, one window after another."""
        return (f"{self.point.cap_w:g} W, batch {self.point.batch_limit}, load {self.load:g}",)


@dataclass(frozen=True, slots=True)
class BudgetStep:
    """A budget that falls after the first window while a load goes on and the fleet's policy divides it, W at node
    level. `load` is the share of what is served at the highest cap and the start batch."""

    before_w: float
    after_w: float
    load: float
    settle_s = KNOWN_S

    @property
    def windows(self) -> tuple[str, ...]:
        """As in `HeldPoint`."""
        before, after = f"{self.before_w:g} W", f"{self.after_w:g} W"
        return f"budget {before}, load {self.load:g}", f"budget {before} -> {after}"


Stage = HeldPoint | BudgetStep

#: Caps that bind weakly, clearly and hard, on batches that vary and on full ones; at last a budget that the policy
#: divides.
STAGES: tuple[Stage, ...] = (
    HeldPoint(OperatingPoint(400.0, 32), 0.7),
    HeldPoint(OperatingPoint(250.0, 32), 1.2),
    HeldPoint(OperatingPoint(150.0, 16), 1.2),
    HeldPoint(OperatingPoint(300.0, 4), 1.2),
    BudgetStep(1200.0, 600.0, 0.7),
)


_PROMPTS, _OUTPUTS = np.meshgrid(np.arange(32, 161, 4), np.arange(32, 97, 2))
#: Prompts of 32 to 160 tokens and outputs of 32 to 96, in every combination of steps of 4 and 2.
LENGTHS = Trace(np.zeros(_PROMPTS.size), _PROMPTS.reshape(-1), _OUTPUTS.reshape(-1), 1.0)
WORKLOAD = Workload(float(LENGTHS.prompt_tokens.mean()), float(LENGTHS.output_tokens.mean()))


#: A live replica as the simulator has to know it: its model, the factors of its GPUs' dies, and what its engine's
#: scheduler says of its limits.
Member = tuple[str, tuple[float, ...], SchedulerReading]


def twin(config: FleetConfig, members: Sequence[Member], parked_dies: Sequence[float]) -> SimSetting:
    """The simulator's setting for a live fleet of one node: a replica of each model, predicted as its manager does.

    `parked_dies` are those of the GPUs that no replica holds.
    """
    gpu = find_gpu(config.hardware.virtual.gpu).name
    entries = {model.model_id: model for model in config.models}
    beliefs = Predictors(config)
    models = []
    for name, own_dies, scheduler in members:
        entry = entries[name]
        belief = beliefs.of(name, gpu, len(own_dies), virtual=True)
        models.append(
            SimModel(
                name=name,
                spec=entry.known_as,
                gpu=gpu,
                parallelism=Parallelism(entry.tensor_parallel, entry.expert_parallel),
                max_batch=scheduler.max_batch,
                step_tokens=scheduler.step_tokens,
                kv_tokens=scheduler.kv_tokens,
                workload=WORKLOAD,
                target=entry.target.target(),
                belief=belief.surface if belief is not None else None,
            )
        )
    dies = (*(die for _, own_dies, _ in members for die in own_dies), *parked_dies)
    names = tuple(name for name, *_ in members)
    node = SimNode("node", gpu, len(dies), names, overhead=config.overhead.overhead(), dies=dies)
    return SimSetting(
        fleet=SimFleet((node,), tuple(models), reserve_w=config.reserve_w, time_scale=config.time_scale),
        budget_w=config.budget_w,
        policy=load_policy(config.policy),
        duration_s=LEAD_S,
        lease_s=config.lease_s,
        fail_safe_cap_w=config.fail_safe_cap_w,
    )


def look_times(stage: Stage, seconds: float) -> tuple[float, ...]:
    """When to read the counters, s since the load began: where each window begins and ends."""
    starts_s = [stage.settle_s + i * (SETTLE_S + seconds) for i in range(len(stage.windows))]
    return tuple(time_s for start_s in starts_s for time_s in (start_s, start_s + seconds))


def requests_of(stage: Stage, fleet: SimFleet, duration_s: float, seed: int) -> Traces:
    """Poisson arrivals for every model, for so long. The same arguments give the same requests."""
    traces = {}
    for number, model in enumerate(fleet.models):
        highest = OperatingPoint(find_gpu(model.gpu).max_limit_w, model.max_batch)
        at = stage.point if isinstance(stage, HeldPoint) else highest
        roofline = RooflineModel(model.physics, model.workload, fleet.time_scale, model.step_tokens)
        served = float(roofline.predict(at.cap_w, at.batch_limit).throughput_tokens_per_s)
        rate_per_s = stage.load * served / WORKLOAD.output_tokens
        traces[model.name] = poisson(LENGTHS, rate_per_s, duration_s, 10 * seed + number)
    return traces


def simulated(setting: SimSetting, stage: Stage, traces: Traces, looks_s: Sequence[float]) -> list[Readings]:
    """What the twin's counters say at these times."""
    if isinstance(stage, HeldPoint):
        fleet = fixed_at(setting.fleet, {model.name: stage.point for model in setting.fleet.models})
        setting = replace(setting, fleet=fleet)
    else:
        fall = Entry(LEAD_S + looks_s[1], math.inf, stage.after_w)
        setting = replace(setting, budget_w=stage.before_w, plan=Schedule((fall,)))
    requests = {
        name: replace(trace, arrival_s=trace.arrival_s + LEAD_S, duration_s=trace.duration_s + LEAD_S)
        for name, trace in traces.items()
    }
    run = Run(replace(setting, duration_s=LEAD_S + max(looks_s)), requests)
    found: list[Readings] = []
    for look_s in looks_s:
        run.events.at(LEAD_S + look_s, lambda now_s: found.append(_readings(run, now_s)))
    run.to_the_end()
    return found


def _readings(run: Run, now_s: float) -> Readings:
    found = {}
    for placed in run.fleet.placed:
        engine = placed.engine
        engine.read(now_s)
        found[placed.model.name] = Reading(
            now_s, engine.telemetry(now_s), engine.energy_j, engine.power_w, engine.binding
        )
    return found


def within(row: Row) -> bool:
    """Whether every error of a row is within its limit."""
    return all(error is not None and abs(error) <= LIMITS[name] for name, error in row["errors"].items())


def rows_of(stage: Stage, live: Sequence[Readings], twins: Sequence[Readings]) -> list[Row]:
    """Each model in each window of a stage, by what both sides' counters said at its looks.

    `errors` are simulated over live less 1, of each figure of `LIMITS`; None where a side has nothing to say of it.
    """
    rows = []
    for number, what in enumerate(stage.windows):
        first, last = 2 * number, 2 * number + 1
        for model in live[first]:
            seen = between(live[first][model], live[last][model])
            ours, theirs = figures_of(between(twins[first][model], twins[last][model])), figures_of(seen)
            row = {"model": model, "what": what, "live": theirs, "simulated": ours}
            for side, readings in (("live", live), ("simulated", twins)):
                row[f"{side}_verdicts"] = _verdicts(readings[first][model], readings[last][model])
            row["errors"] = {name: _error(theirs[name], ours[name]) for name in LIMITS}
            rows.append(row | {"late_share": seen.late_share, "modelled_over_wall": seen.modelled_over_wall})
    return rows


def figures_of(seen: ReplicaTelemetry) -> dict[str, float | None]:
    """What is shown of a side: output tokens/s, W of all GPUs of the replica, median ITL, TPOT and TTFT, s."""
    return {
        "tokens_per_s": seen.throughput_tokens_per_s,
        "power_w": seen.power_w,
        "itl_p50_s": seen.itl.p50_s,
        "tpot_p50_s": seen.tpot.p50_s,
        "ttft_p50_s": seen.ttft.p50_s,
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The JSON object: every row with both sides and errors, the largest errors, the attainment of all windows together
    on either side, and whether all are within limits."""
    errors = {name: max(abs(row["errors"][name] or 0.0) for row in rows) for name in LIMITS}
    live, simulated = (_attainment([row[f"{side}_verdicts"] for row in rows]) for side in ("live", "simulated"))
    alike = live is not None and simulated is not None and abs(simulated - live) <= ATTAINMENT_LIMIT
    return {
        "within": all(map(within, rows)) and alike,
        "largest_errors": errors,
        "live_attainment": live,
        "simulated_attainment": simulated,
        "rows": list(rows),
    }


def _verdicts(first: Reading, last: Reading) -> dict[str, int]:
    """How many requests were judged good, and late, between two readings."""
    assert first.engine is not None
    assert last.engine is not None
    found = last.engine.verdicts - first.engine.verdicts
    return {"good": found.good, "late": found.late}


def _attainment(verdicts: Sequence[Mapping[str, int]]) -> float | None:
    return share_of(sum(v["good"] for v in verdicts), sum(v["late"] for v in verdicts))


def _error(live: float | None, simulated: float | None) -> float | None:
    return simulated / live - 1.0 if live and simulated is not None else None
