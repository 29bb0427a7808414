"""A baseline: the batch limit stays where it started, only watts move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pals_ray.control.allocation.policy_shares import best_shares
from pals_ray.control.snapshot import FleetSnapshot, Share
from pals_ray.models.power_model import PowerModel


def allocate(snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> dict[str, Share]:
    """As `pals`, on menus at each replica's start value, which it pins."""
    start = max((r.max_batch for r in snapshot.replicas), default=1)  # a menu ends at its replica's own start value
    shares = best_shares(snapshot, models, pin_batch_limit=start)
    own = {r.replica_id: r.max_batch for r in snapshot.replicas}
    return {name: replace(share, pin_batch_limit=own[name]) for name, share in shares.items()}
