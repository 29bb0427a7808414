"""A baseline: every GPU at the cap of an even split, only batch limits are tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pals_ray.control.snapshot import FleetSnapshot, Share
from pals_ray.models.power_model import PowerModel
from policies import uniform


def allocate(snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> dict[str, Share]:
    """Uniform shares with the cap pinned at what each pays for; the agent tunes its batch limit as it always does."""
    shares = uniform.allocate(snapshot, models)
    pinned = {}
    for r in snapshot.replicas:
        share = shares[r.replica_id]
        paid_w = r.overhead.gpu_w(share.charge_w, r.num_gpus, r.node_gpus) / r.num_gpus
        cap_w = min(max(paid_w, r.min_limit_w), r.max_limit_w)
        pinned[r.replica_id] = replace(share, pin_cap_w=cap_w, reason=f"cap pinned at {cap_w:.0f} W: {share.reason}")
    return pinned
