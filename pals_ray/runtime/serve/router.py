"""The request router of our deployments: Serve's power of two choices, without parked replicas."""

from __future__ import annotations

from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest

#: The key in a replica's routing statistics that says whether it is parked.
PARKED = "pals_parked"

#: The routers learn of it within this time plus one reconcile period of Serve's, s.
STATS_PERIOD_S = 1.0


class PowerRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    """Requests go to replicas that are not parked; where all are parked, the parked ones serve."""

    def apply_locality_routing(self, pending_request: PendingRequest | None = None) -> set[ReplicaID]:
        """Serve's candidates, without those that are parked."""
        return self._awake(super().apply_locality_routing(pending_request))

    def apply_multiplex_routing(self, pending_request: PendingRequest | None = None) -> set[ReplicaID]:
        """Serve's candidates for a multiplexed model, without those that are parked."""
        return self._awake(super().apply_multiplex_routing(pending_request))

    def _awake(self, candidates: set[ReplicaID]) -> set[ReplicaID]:
        replicas = self._replicas
        awake = {name for name, replica in replicas.items() if not replica.routing_stats.get(PARKED)}
        return (candidates & awake) or awake or candidates


ROUTER_CONFIG: dict[str, Any] = {
    "request_router_class": "pals_ray.runtime.serve.router:PowerRouter",
    "request_routing_stats_period_s": STATS_PERIOD_S,
}
