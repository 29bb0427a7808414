"""Watts in proportion to demand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pals_ray.control.allocation.budget_tree import FloatArray, bounds_w, gpu_counts, shares_in_stages
from pals_ray.control.snapshot import FleetSnapshot, ReplicaSnapshot, Share
from pals_ray.models.power_model import PowerModel


def allocate(snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> dict[str, Share]:
    """A split in proportion to demand; what demand leaves over is split evenly by GPU count.

    Demand is tokens/s where it is known of every replica (shares need one unit), else requests running and waiting.
    """
    _, most_w = bounds_w(snapshot)
    demand, unit = _demand(snapshot.replicas)
    stages = [(demand, most_w), (gpu_counts(snapshot), most_w)]
    return shares_in_stages(snapshot, stages, lambda i, _, w: f"{w:.0f} W for a demand of {demand[i]:.4g} {unit}")


def _demand(replicas: tuple[ReplicaSnapshot, ...]) -> tuple[FloatArray, str]:
    known = [r.demand_tokens_per_s for r in replicas if r.demand_tokens_per_s is not None]
    if len(known) == len(replicas):
        return np.array(known, dtype=float), "tokens/s"
    return np.array([r.telemetry.running + r.telemetry.waiting for r in replicas], dtype=float), "requests"
