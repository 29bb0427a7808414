"""Running a setting under given requests, and collecting the result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pals_ray.control.budget.moving_budget import FollowedSignal
from pals_ray.simulation.engine.energy_meter import METER_S
from pals_ray.simulation.fleet import Placed
from pals_ray.simulation.results.run_result import FloatArray, ModelResult, ReplicaResult, RunResult
from pals_ray.simulation.run import Run
from pals_ray.simulation.setting import Offered, SimSetting


def simulate(setting: SimSetting, requests: Offered) -> RunResult:
    """Run the fleet for `setting.duration_s` under these requests; the same input gives the same result to the last
    digit. Raises `SimulationError` for a fleet that cannot be, `InfeasibleBudget` for a budget under its lowest caps.
    """
    run = Run(setting, requests)
    run.to_the_end()
    found = collect(run)
    if setting.follow_s == 0.0:
        return found
    followed_s = run.follow()
    models = {name: replace(model, requests=run.fleet.logs[name].outcomes()) for name, model in found.models.items()}
    return replace(found, models=models, followed_s=followed_s)


def collect(run: Run) -> RunResult:
    """The result of a run that is over."""
    setting, fleet, samples = run.setting, run.fleet, run.samples
    time_s = setting.interval_s * np.arange(1, samples.taken + 1, dtype=np.float64)
    gpu_w, node_w = _drawn_w(run, time_s)
    energy_j = sum(p.engine.energy_j for p in fleet.placed) + sum(
        fleet.parked_draw_w(node) * min(setting.duration_s, run.died_s.get(node.name, setting.duration_s))
        for node in fleet.nodes.values()
    )
    over_s, over_max_w = _over_budget(run)
    charge_w = np.array(run.charges_w)
    return RunResult(
        duration_s=setting.duration_s,
        followed_s=setting.duration_s,
        models={name: _model(run, name) for name in fleet.logs},
        replicas=tuple(_replica(run, i, placed) for i, placed in enumerate(fleet.placed)),
        time_s=time_s,
        budget_w=run.budgets.budget_at(time_s),
        charge_w=charge_w,
        power_w=gpu_w,
        node_power_w=node_w,
        target_w=np.array(run.targets_w) if isinstance(setting.plan, FollowedSignal) else None,
        energy_j=energy_j,
        node_energy_j=fleet.node_j(setting.duration_s, run.died_s),
        tokens=sum(p.engine.generated for p in fleet.placed),
        over_budget_s=over_s,
        over_budget_max_w=over_max_w,
        charge_over_s=run.budgets.over_s,
        stranded_w=float(np.maximum(charge_w - node_w, 0.0).mean()) if len(time_s) else 0.0,
        cuts=tuple(run.budgets.cuts),
        grants=sum(manager.grants for manager in run.managers),
        notes=tuple(filter(None, [run.source.note, *(note for m in run.managers for note in m.core.notes)])),
    )


def _model(run: Run, name: str) -> ModelResult:
    log = run.fleet.logs[name]
    return ModelResult(
        name=name,
        target=run.setting.fleet.model(name).target,
        requests=log.outcomes(),
        itl_counts=np.array(log.itl_counts, dtype=np.int64),
    )


def _replica(run: Run, i: int, placed: Placed) -> ReplicaResult:
    engine, agent = placed.engine, run.agents.get(placed.spec.replica_id)
    return ReplicaResult(
        replica_id=placed.spec.replica_id,
        model=placed.model.name,
        energy_j=engine.energy_j,
        tokens=engine.generated,
        preemptions=engine.preemptions,
        decisions=agent.decisions if agent else 0,
        cap_changes=agent.cap_changes if agent else 0,
        **{name: series[i, : run.samples.taken] for name, series in run.samples.series.items()},
    )


def _drawn_w(run: Run, time_s: FloatArray) -> tuple[FloatArray, FloatArray]:
    """GPU watts and node watts of the whole fleet, as means over each interval."""
    drawn_w = run.samples.series["power_w"][:, : len(time_s)].astype(np.float64)
    factor = np.array([1.0 + placed.node.overhead.b for placed in run.fleet.placed])
    gpu_w, node_w = drawn_w.sum(axis=0), factor @ drawn_w
    for node in run.fleet.nodes.values():
        alive = time_s <= run.died_s.get(node.name, np.inf)
        parked_w = run.fleet.parked_draw_w(node)
        gpu_w += parked_w * alive
        node_w += run.fleet.rest_w(node) * alive
    return gpu_w, node_w


def _over_budget(run: Run) -> tuple[float, float]:
    """For how long the draw was over the budget, s, and by how much at most, W, in the meter's bins."""
    drawn_w = run.fleet.meter.power_w(run.setting.duration_s)
    end_s = METER_S * np.arange(1, len(drawn_w) + 1, dtype=np.float64)
    for node in run.fleet.nodes.values():
        drawn_w += run.fleet.rest_w(node) * (end_s <= run.died_s.get(node.name, np.inf))
    # A budget that changes within a bin holds from the next one on.
    over_w = drawn_w - run.budgets.budget_at(end_s - METER_S)
    # Less than a thousandth of a watt is rounding.
    over = over_w > 1e-3
    return float(METER_S * over.sum()), float(over_w[over].max()) if over.any() else 0.0
