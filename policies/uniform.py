"""Every GPU the same: the budget split evenly by GPU count, whoever needs it."""

from __future__ import annotations

from collections.abc import Mapping

from pals_ray.control.allocation.budget_tree import bounds_w, gpu_counts, shares_in_stages
from pals_ray.control.snapshot import FleetSnapshot, Share
from pals_ray.models.power_model import PowerModel


def allocate(snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> dict[str, Share]:
    """An even split by GPU count within each replica's least and most charge; what one cannot take goes to the rest."""
    stage = (gpu_counts(snapshot), bounds_w(snapshot)[1])
    return shares_in_stages(snapshot, [stage], lambda _, r, w: f"{w / r.num_gpus:.0f} W for each GPU")
