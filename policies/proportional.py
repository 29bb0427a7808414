"""Watts in proportion to demand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pals_ray.control.allocation.budget_tree import BudgetTree, FloatArray, bounds_w, fill_evenly, held_reason
from pals_ray.control.snapshot import FleetSnapshot, ReplicaSnapshot, Share
from pals_ray.models.power_model import PowerModel


def allocate(snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> dict[str, Share]:
    """A split in proportion to demand; what demand leaves over is split evenly by GPU count.

    Demand is tokens/s where it is known of every replica (shares need one unit), else requests running and waiting.
    """
    tree = BudgetTree.of(snapshot)
    least_w, most_w = bounds_w(snapshot)
    demand, unit = _demand(snapshot.replicas)
    asked_w, held_by = fill_evenly(tree, demand, least_w, most_w)
    gpus = np.array([r.num_gpus for r in snapshot.replicas], dtype=float)
    charge_w, spill_held_by = fill_evenly(tree, gpus, asked_w, most_w)
    held_by = np.where(held_by >= 0, held_by, spill_held_by)
    return {
        r.replica_id: Share(w, f"{w:.0f} W for a demand of {d:.4g} {unit}, {held_reason(tree, r, w, v)}")
        for r, w, d, v in zip(snapshot.replicas, charge_w.tolist(), demand.tolist(), held_by.tolist(), strict=True)
    }


def _demand(replicas: tuple[ReplicaSnapshot, ...]) -> tuple[FloatArray, str]:
    known = [r.demand_tokens_per_s for r in replicas if r.demand_tokens_per_s is not None]
    if len(known) == len(replicas):
        return np.array(known, dtype=float), "tokens/s"
    return np.array([r.telemetry.running + r.telemetry.waiting for r in replicas], dtype=float), "requests"
