"""A baseline: every GPU at the cap of an even split, only batch limits are tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pals_ray.control.snapshot import FleetSnapshot, ReplicaSnapshot, Share
from pals_ray.models.power_model import PowerModel
from policies import uniform


def allocate(snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> dict[str, Share]:
    """Uniform shares with the cap pinned at what each pays for; the agent tunes its batch limit as it always does."""
    shares = uniform.allocate(snapshot, models)
    return {r.replica_id: _pinned(r, shares[r.replica_id]) for r in snapshot.replicas}


def _pinned(replica: ReplicaSnapshot, share: Share) -> Share:
    paid_w = replica.overhead.gpu_w(share.charge_w, replica.num_gpus, replica.node_gpus) / replica.num_gpus
    cap_w = min(max(paid_w, replica.min_limit_w), replica.max_limit_w)
    return replace(share, pin_cap_w=cap_w, reason=f"cap pinned at {cap_w:.0f} W: {share.reason}")
