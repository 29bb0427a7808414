"""Every GPU the same: the budget split evenly by GPU count, whoever needs it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pals_ray.control.allocation.budget_tree import BudgetTree, bounds_w, fill_evenly, held_reason
from pals_ray.control.snapshot import FleetSnapshot, Share
from pals_ray.models.power_model import PowerModel


def allocate(snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> dict[str, Share]:
    """An even split by GPU count within each replica's least and most charge; what one cannot take goes to the rest."""
    tree = BudgetTree.of(snapshot)
    least_w, most_w = bounds_w(snapshot)
    gpus = np.array([r.num_gpus for r in snapshot.replicas], dtype=float)
    charge_w, held_by = fill_evenly(tree, gpus, least_w, most_w)
    return {
        r.replica_id: Share(w, f"{w / r.num_gpus:.0f} W for each GPU, {held_reason(tree, r, w, v)}")
        for r, w, v in zip(snapshot.replicas, charge_w.tolist(), held_by.tolist(), strict=True)
    }
