"""The default: every watt where the models say that it serves most, by priority class, minimum shares first."""

from __future__ import annotations

from collections.abc import Mapping

from pals_ray.control.allocation.policy_shares import best_shares
from pals_ray.control.snapshot import FleetSnapshot, Share
from pals_ray.models.power_model import PowerModel


def allocate(snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> dict[str, Share]:
    """The division of the highest value; the present one stays unless that is untenable or gains under 1 %."""
    return best_shares(snapshot, models)
