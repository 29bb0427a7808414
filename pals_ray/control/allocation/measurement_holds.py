"""Measurement holds: a replica kept at one operating point for a profiler, while the others divide the rest.

A hold is leased: when a profiler dies its hold is not renewed, and the policy divides all watts again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pals_ray.control.allocation.budget_tree import BudgetTree
from pals_ray.control.charge import EPS_W
from pals_ray.control.snapshot import FleetSnapshot, ReplicaSnapshot, Share
from pals_ray.errors import PalsError
from pals_ray.types import OperatingPoint

#: How long a hold lasts unless renewed, s.
HOLD_LEASE_S = 5.0


class HoldRefused(PalsError):
    """A replica that cannot be held at a point."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A replica's point, whose it is, its charge at node level, W, and when it lapses (manager's clock, s)."""

    owner: str
    point: OperatingPoint
    charge_w: float
    until_s: float


class MeasurementHolds:
    """The holds of one manager, by replica. They are in no file: a new manager's fleet is the policy's alone."""

    def __init__(self) -> None:
        self._holds: dict[str, Hold] = {}

    def take(self, snapshot: FleetSnapshot, replica_id: str, hold: Hold) -> bool:
        """Hold a replica, or renew its hold; whether that changes its point.

        Raises `HoldRefused` where another profiler holds it, or with the watts that the budget lacks.
        """
        present = self._holds.get(replica_id)
        if present is not None and present.owner != hold.owner and present.until_s > snapshot.now_s:
            raise HoldRefused(f"{replica_id} is being measured by another profiler: wait until that has ended")
        room_w, where = self.room_w(snapshot, replica_id)
        if hold.charge_w > room_w + EPS_W:
            raise HoldRefused(
                f"{replica_id} at {hold.point.cap_w:g} W per GPU takes {hold.charge_w:.0f} W, but {where} leaves it "
                f"{room_w:.0f} W beside all others at their lowest caps: {hold.charge_w - room_w:.0f} W more are "
                "needed in that budget, or a lower cap"
            )
        self._holds[replica_id] = hold
        return present is None or (present.point, present.charge_w) != (hold.point, hold.charge_w)

    def release(self, replica_id: str, owner: str) -> None:
        """End a hold of this owner, if there is one."""
        if replica_id in self._holds and self._holds[replica_id].owner == owner:
            del self._holds[replica_id]

    def room_w(self, snapshot: FleetSnapshot, replica_id: str) -> tuple[float, str]:
        """The highest charge that a replica may be held at, others held or at their least, W; and whose budget says so.

        Raises `HoldRefused` for a replica that holds no GPUs.
        """
        ids = [r.replica_id for r in snapshot.replicas]
        if replica_id not in ids:
            raise HoldRefused(f"{replica_id} does not serve: it holds no GPUs that could be capped")
        tree, rows = BudgetTree.of(snapshot), snapshot.replicas
        others_w = np.array([0.0 if r.replica_id == replica_id else self._least_w(r, snapshot) for r in rows])
        left_w = tree.budget_w - tree.subtotals_w(others_w)
        path = tree.paths()[tree.node_of[ids.index(replica_id)]]
        tightest = min(path, key=lambda node: float(left_w[node]))
        return float(left_w[tightest]), tree.names[tightest]

    def divide(
        self, snapshot: FleetSnapshot, policy: Callable[[FleetSnapshot], Mapping[str, Share]]
    ) -> Mapping[str, Share]:
        """Shares of all: the replicas held, their watts taken off like parked ones, then the policy's for the rest."""
        self._drop_ended(snapshot)
        if not self._holds:
            return policy(snapshot)
        taken_w = dict(snapshot.parked_charge_w)
        shares: dict[str, Share] = {}
        for row in snapshot.replicas:
            if (hold := self._holds.get(row.replica_id)) is not None:
                taken_w[row.domain] = taken_w.get(row.domain, 0.0) + hold.charge_w
                reason = f"held at {hold.point.cap_w:g} W, batch limit {hold.point.batch_limit}, to be measured"
                shares[row.replica_id] = Share(hold.charge_w, reason, hold.point.cap_w, hold.point.batch_limit)
        others = tuple(row for row in snapshot.replicas if row.replica_id not in shares)
        return {**shares, **(policy(replace(snapshot, replicas=others, parked_charge_w=taken_w)) if others else {})}

    def _drop_ended(self, snapshot: FleetSnapshot) -> None:
        """Forget holds that lapsed, whose replica has gone, or that a lower budget has no room for any more."""
        serving = {row.replica_id for row in snapshot.replicas}
        for name, hold in list(self._holds.items()):
            live = hold.until_s > snapshot.now_s and name in serving
            if not live or hold.charge_w > self.room_w(snapshot, name)[0] + EPS_W:
                del self._holds[name]

    def _least_w(self, row: ReplicaSnapshot, snapshot: FleetSnapshot) -> float:
        hold = self._holds.get(row.replica_id)
        return hold.charge_w if hold is not None and hold.until_s > snapshot.now_s else row.least_charge_w
