"""A baseline: the batch limit stays where it started, only watts move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pals_ray.control.allocation.policy_shares import best_shares
from pals_ray.control.snapshot import FleetSnapshot, Share
from pals_ray.models.power_model import PowerModel


def allocate(
    snapshot: FleetSnapshot, models: Mapping[str, PowerModel], batch_limit: int | None = None
) -> dict[str, Share]:
    """As `pals`, on menus at one batch limit, which it pins: the start value, or `batch_limit` where that is lower."""
    start = max((r.max_batch for r in snapshot.replicas), default=1)  # a menu ends at its replica's own start value
    shares = best_shares(snapshot, models, pin_batch_limit=batch_limit or start)
    own = {r.replica_id: min(r.max_batch, batch_limit or r.max_batch) for r in snapshot.replicas}
    return {name: replace(share, pin_batch_limit=own[name]) for name, share in shares.items()}
