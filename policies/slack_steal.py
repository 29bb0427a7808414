"""A baseline without models: watts that do not bind move to replicas that are held by their cap."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pals_ray.control.allocation.budget_tree import BudgetTree, bounds_w, fill_evenly, held_reason
from pals_ray.control.allocation.replica_menu import BINDING, HEADROOM
from pals_ray.control.snapshot import FleetSnapshot, ReplicaSnapshot, Share
from pals_ray.models.power_model import PowerModel


def allocate(snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> dict[str, Share]:
    """An even split by GPU count in which whoever does not bind keeps its natural draw and headroom, no more.

    What is left after all that bind are at their most goes to everybody, evenly.
    """
    tree = BudgetTree.of(snapshot)
    least_w, most_w = bounds_w(snapshot)
    used_w = np.clip([_useful_w(r) for r in snapshot.replicas], least_w, most_w)
    gpus = np.array([r.num_gpus for r in snapshot.replicas], dtype=float)
    stolen_w, held_by = fill_evenly(tree, gpus, least_w, used_w)
    charge_w, spill_held_by = fill_evenly(tree, gpus, stolen_w, most_w)
    held_by = np.where(held_by >= 0, held_by, spill_held_by)
    return {
        r.replica_id: Share(w, f"{_what(r, u)}, {held_reason(tree, r, w, v)}")
        for r, u, w, v in zip(snapshot.replicas, used_w.tolist(), charge_w.tolist(), held_by.tolist(), strict=True)
    }


def _binds(replica: ReplicaSnapshot) -> bool:
    return replica.natural_draw_w is None or replica.telemetry.binding_share >= BINDING


def _useful_w(replica: ReplicaSnapshot) -> float:
    if _binds(replica) or replica.natural_draw_w is None:
        return replica.most_charge_w
    return replica.overhead.charge_w(replica.natural_draw_w * (1 + HEADROOM), replica.num_gpus, replica.node_gpus)


def _what(replica: ReplicaSnapshot, useful_w: float) -> str:
    return "held by its cap" if _binds(replica) else f"not binding: can use {useful_w:.0f} W"
