"""The reference: everything at maximum, which a budget has to allow."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pals_ray.control.allocation.budget_tree import BudgetTree, bounds_w
from pals_ray.control.snapshot import FleetSnapshot, Share
from pals_ray.errors import InfeasibleBudget
from pals_ray.models.power_model import PowerModel


def allocate(snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> dict[str, Share]:
    """The highest cap and the start batch for all. Raises `InfeasibleBudget` with the watts that this needs."""
    tree = BudgetTree.of(snapshot)
    _, most_w = bounds_w(snapshot)
    needed_w = tree.subtotals_w(most_w)
    over_w = needed_w - tree.budget_w
    if (over_w > 0).any():
        v = int(np.argmax(over_w))
        raise InfeasibleBudget(
            float(tree.budget_w[v]),
            float(needed_w[v]),
            f"policy static runs all replicas of {tree.names[v]} at maximum; raise the budget or choose policies.pals",
        )
    return {
        r.replica_id: Share(w, "its least: it is parked")
        if r.parked
        else Share(w, "everything at maximum", pin_cap_w=r.max_limit_w, pin_batch_limit=r.max_batch)
        for r, w in zip(snapshot.replicas, most_w.tolist(), strict=True)
    }
