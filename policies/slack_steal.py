"""A baseline without models: watts that replicas do not need go to those that are held by their cap."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pals_ray.control.allocation.budget_tree import bounds_w, gpu_counts, shares_in_stages
from pals_ray.control.allocation.replica_menu import BINDING, HEADROOM
from pals_ray.control.snapshot import FleetSnapshot, ReplicaSnapshot, Share
from pals_ray.models.power_model import PowerModel


def allocate(snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> dict[str, Share]:
    """An even split by GPU count in which replicas whose cap does not bind get no more than natural draw and headroom.

    What is left when all whose cap binds are at their most is split evenly among all.
    """
    least_w, most_w = bounds_w(snapshot)
    useful_w = np.clip([_useful_w(r) for r in snapshot.replicas], least_w, most_w)
    gpus = gpu_counts(snapshot)

    def describe(i: int, replica: ReplicaSnapshot, _: float) -> str:
        return "held by its cap" if _binds(replica) else f"not binding: can use {useful_w[i]:.0f} W"

    return shares_in_stages(snapshot, [(gpus, useful_w), (gpus, most_w)], describe)


def _binds(replica: ReplicaSnapshot) -> bool:
    return replica.natural_draw_w is None or replica.telemetry.binding_share >= BINDING


def _useful_w(replica: ReplicaSnapshot) -> float:
    if _binds(replica) or replica.natural_draw_w is None:
        return replica.most_charge_w
    return replica.overhead.charge_w(replica.natural_draw_w * (1 + HEADROOM), replica.num_gpus, replica.node_gpus)
