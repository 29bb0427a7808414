"""Parking replicas: which of them rest while the budget cannot give every replica its least grant.

A parked replica has the lowest cap, runs one sequence at a time, and gets no new requests while another of its model
is awake. So a model's last replica is never parked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pals_ray.control.allocation.budget_tree import FloatArray
from pals_ray.control.allocation.policy_shares import FleetMenus
from pals_ray.control.snapshot import FleetSnapshot, Policy, Share
from pals_ray.models.power_model import PowerModel

#: A parked replica is woken only when all least grants leave this share of every budget free, or it would alternate.
SPARE = 0.05


class ReplicaParking:
    """A policy around another one: it parks first, and the other divides what is left."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._parked: frozenset[str] = frozenset()

    def __call__(self, snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> Mapping[str, Share]:
        """The policy's shares, and one that parks for each replica that has to rest."""
        self._parked = to_park(snapshot, models, self._parked)
        rows = tuple(replace(r, parked=r.replica_id in self._parked) for r in snapshot.replicas)
        reason = "parked: the budget cannot give every replica its least grant"
        parking = {r.replica_id: Share(r.least_charge_w, reason, r.min_limit_w, 1, True) for r in rows if r.parked}
        return {**self._policy(replace(snapshot, replicas=rows), models), **parking}


def to_park(snapshot: FleetSnapshot, models: Mapping[str, PowerModel], now: frozenset[str]) -> frozenset[str]:
    """The replicas that have to rest, lowest priority first, then least demand; `now` are those that rest already."""
    if not snapshot.replicas:
        return frozenset()
    awake = replace(snapshot, replicas=tuple(replace(r, parked=False) for r in snapshot.replicas))
    fleet = FleetMenus.of(awake, models)
    floor_w = fleet.least_w + fleet.menus.extra_w[np.arange(len(fleet.floor)), fleet.floor]
    return _resting(awake, fleet, floor_w, 0.0) | (now & _resting(awake, fleet, floor_w, SPARE))


def _resting(snapshot: FleetSnapshot, fleet: FleetMenus, floor_w: FloatArray, spare: float) -> frozenset[str]:
    """Which have to rest so that all least grants (n,), W, fit every budget less the share `spare`, if possible."""
    rows, charge_w = snapshot.replicas, floor_w.copy()
    awake = Counter(r.model for r in rows)
    order = sorted(
        range(len(rows)),
        key=lambda i: (-rows[i].target.priority, rows[i].demand_tokens_per_s or 0.0, rows[i].replica_id),
    )
    resting: set[int] = set()
    for below, budget_w in zip(fleet.tree.members(), (1.0 - spare) * fleet.tree.budget_w, strict=True):
        for i in order:
            if charge_w[below].sum() <= budget_w:
                break
            frees = below[i] and i not in resting and charge_w[i] > fleet.least_w[i]
            if frees and awake[rows[i].model] > 1:
                resting.add(i)
                awake[rows[i].model] -= 1
                charge_w[i] = fleet.least_w[i]
    return frozenset(rows[i].replica_id for i in resting)
