"""Running the policy: when its answer is passed on, and what happens where it fails."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from pals_ray.control.allocation.measurement_holds import MeasurementHolds
from pals_ray.control.snapshot import FleetSnapshot, Policy, ReplicaSnapshot, Share
from pals_ray.errors import PalsError
from pals_ray.models.power_model import PowerModel

#: A share that differs by less than this part of the present grant is not worth a driver call.
NEAR = 0.02

log = logging.getLogger("pals.manager")


class PolicyRunner:
    """A fleet's policy, loaded from `path`, and what it last asked for."""

    def __init__(self, path: str, policy: Policy) -> None:
        self.path = path
        self._policy = policy
        self._asked: Mapping[str, Share] = {}
        self._budget_w: float | None = None
        self._failure: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Why the policy has no answer at present, for status; nothing while it has one."""
        return () if self._failure is None else (self._failure,)

    def shares(
        self, snapshot: FleetSnapshot, models: Mapping[str, PowerModel], holds: MeasurementHolds | None = None
    ) -> Mapping[str, Share] | None:
        """What each replica is to have, those held for a measurement first.

        None where everything stays as it is, because nothing has moved or because the policy fails.
        """
        if not snapshot.replicas:
            return None
        moved_w = 0.0 if self._budget_w is None else snapshot.budget_w - self._budget_w
        snapshot = replace(snapshot, budget_moved_w=moved_w)
        try:
            shares = (holds or MeasurementHolds()).divide(snapshot, lambda rest: self._policy(rest, models))
        except Exception as error:  # a policy may be the operator's own: it must not stop the manager's beat
            self._fail(error)
            return None
        self._failure = None
        served = [r for r in snapshot.replicas if r.replica_id in shares]
        if moved_w == 0.0 and all(_near(shares[r.replica_id], r, self._asked.get(r.replica_id)) for r in served):
            return None
        self._asked, self._budget_w = shares, snapshot.budget_w
        return shares

    def _fail(self, error: Exception) -> None:
        what = str(error) if isinstance(error, PalsError) else f"{type(error).__name__}: {error}"
        failure = f"policy {self.path} divides nothing, all keep what they have: {what}"
        if failure != self._failure:
            log.warning("%s", failure, exc_info=None if isinstance(error, PalsError) else error)
        self._failure = failure


def _near(share: Share, replica: ReplicaSnapshot, asked: Share | None) -> bool:
    """Whether a share is near the present grant, with the same pins as last asked for."""
    same_pins = asked is not None and share.pins == asked.pins
    return same_pins and abs(share.charge_w - replica.grant_w) <= NEAR * replica.grant_w
