"""From a run that is over to its result."""

from __future__ import annotations

import numpy as np

from pals_ray.simulation.engine.energy_meter import METER_S
from pals_ray.simulation.fleet import Placed
from pals_ray.simulation.results.run_result import FloatArray, ModelResult, ReplicaResult, RunResult
from pals_ray.simulation.run import Run
from pals_ray.simulation.setting import FollowedSignal


def collect(run: Run) -> RunResult:
    """All that was recorded."""
    setting, fleet, samples = run.setting, run.fleet, run.samples
    time_s = setting.interval_s * np.arange(1, samples.taken + 1, dtype=np.float64)
    gpu_w, node_w = _drawn_w(run, time_s)
    budget_w = run.budgets.budget_at(time_s)
    energy_j = sum(p.engine.energy_j for p in fleet.placed) + sum(
        fleet.parked_draw_w(node) * min(setting.duration_s, run.died_s.get(node.name, setting.duration_s))
        for node in fleet.all_nodes
    )
    over_s, over_max_w = _over_budget(run)
    charge_w = run.charges_w[: samples.taken]
    return RunResult(
        duration_s=setting.duration_s,
        models={name: _model(run, name) for name in fleet.logs},
        replicas=tuple(_replica(run, i, placed) for i, placed in enumerate(fleet.placed)),
        time_s=time_s,
        budget_w=budget_w,
        charge_w=np.array(charge_w),
        power_w=gpu_w,
        node_power_w=node_w,
        target_w=np.array(run.targets_w) if isinstance(setting.budget, FollowedSignal) else None,
        energy_j=energy_j,
        node_energy_j=fleet.node_j(setting.duration_s, run.died_s),
        tokens=sum(p.engine.generated for p in fleet.placed),
        meter_s=METER_S,
        over_budget_s=over_s,
        over_budget_max_w=over_max_w,
        charge_over_s=run.budgets.over_s,
        stranded_w=float(np.maximum(np.array(charge_w) - node_w, 0.0).mean()) if len(time_s) else 0.0,
        cuts=run.budgets.cuts,
        grants=sum(manager.grants for manager in run.managers),
        divisions=sum(manager.core.divisions for manager in run.managers),
        notes=tuple(filter(None, [run.source.note, *(note for m in run.managers for note in m.core.notes)])),
    )


def _model(run: Run, name: str) -> ModelResult:
    log, account = run.fleet.logs[name], run.qos[name]
    return ModelResult(
        name=name,
        target=account.target,
        requests=log.outcomes(),
        itl_counts=np.array(log.itl_counts, dtype=np.int64),
        qos=account.state,
        intervals=tuple(account.intervals),
    )


def _replica(run: Run, i: int, placed: Placed) -> ReplicaResult:
    engine, agent = placed.engine, run.agents.get(placed.replica_id)
    return ReplicaResult(
        replica_id=placed.replica_id,
        model=placed.model.name,
        node=placed.node.name,
        num_gpus=len(placed.uuids),
        energy_j=engine.energy_j,
        busy_s=engine.busy_s,
        tokens=engine.generated,
        prompt_tokens=engine.prompted,
        preemptions=engine.preemptions,
        decisions=agent.decisions if agent else 0,
        cap_changes=agent.cap_changes if agent else 0,
        batch_changes=agent.batch_changes if agent else 0,
        **{name: series[i, : run.samples.taken] for name, series in run.samples.series.items()},
    )


def _drawn_w(run: Run, time_s: FloatArray) -> tuple[FloatArray, FloatArray]:
    """GPU watts and node watts of the whole fleet, as means over each interval."""
    drawn_w = run.samples.series["power_w"][:, : len(time_s)].astype(np.float64)
    factor = np.array([1.0 + placed.node.overhead.b for placed in run.fleet.placed])
    gpu_w, node_w = drawn_w.sum(axis=0), factor @ drawn_w
    for node in run.fleet.all_nodes:
        alive = time_s <= run.died_s.get(node.name, np.inf)
        parked_w = run.fleet.parked_draw_w(node)
        gpu_w += parked_w * alive
        node_w += (parked_w * (1.0 + node.overhead.b) + node.overhead.a_w) * alive
    return gpu_w, node_w


def _over_budget(run: Run) -> tuple[float, float]:
    """For how long the draw was over the budget, s, and by how much at most, W, in the meter's bins."""
    drawn_w = run.fleet.meter.power_w(run.setting.duration_s)
    end_s = METER_S * np.arange(1, len(drawn_w) + 1, dtype=np.float64)
    for node in run.fleet.all_nodes:
        rest_w = run.fleet.parked_draw_w(node) * (1.0 + node.overhead.b) + node.overhead.a_w
        drawn_w += rest_w * (end_s <= run.died_s.get(node.name, np.inf))
    # A budget that changes within a bin holds from the next one on.
    over_w = drawn_w - run.budgets.budget_at(end_s - METER_S)
    # A thousandth of a watt is rounding, no power.
    over = over_w > 1e-3
    return float(METER_S * over.sum()), float(over_w[over].max()) if over.any() else 0.0
