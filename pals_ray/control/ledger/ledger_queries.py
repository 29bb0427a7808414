"""What can be read from a ledger, by an operator, a policy or a call that waits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pals_ray.control.charge import EPS_W, ChargeTerms
from pals_ray.control.ledger import feasible_charges
from pals_ray.control.ledger.feasible_charges import LedgerConfig, why_fixed
from pals_ray.control.ledger.reservations import Reservations, domain_name
from pals_ray.control.messages import InForce, NodeView, ReplicaView
from pals_ray.control.snapshot import Domain, FleetSnapshot, ReplicaSnapshot
from pals_ray.types import Grant


class LedgerQueries:
    """The part of the ledger that is only read; reading changes nothing."""

    def __init__(self, config: LedgerConfig, budget_w: float, domains: Iterable[Domain]) -> None:
        self.config = config
        #: The fleet's budget, its reserve included, W.
        self.budget_w = budget_w
        self._reservations = Reservations(budget_w - config.reserve_w, domains)
        self._waiting: dict[str, str] = {}

    def needed_w(self, now_s: float, domain: str | None = None) -> float:
        """The least budget that `set_budget` would take now, W (the fleet's with its reserve)."""
        needed_w = feasible_charges.needed_w(self._reservations, now_s, self.config)[domain]
        return needed_w + (self.config.reserve_w if domain is None else 0.0)

    def in_force(self, now_s: float) -> InForce:
        """Whether all that is reserved is within every budget, and whose release is awaited (replica or node names).

        This is how a waiting `set_budget` knows that it is done.
        """
        since_s = {name: replica.waiting_since_s for name, replica in self._reservations.replicas.items()}
        since_s.update((name, node.unparked_since_s) for name, node in self._reservations.nodes.items())
        waits_s = {name: now_s - start_s for name, start_s in since_s.items() if start_s is not None}
        over_w = self._reservations.over_w()
        if not over_w:
            return InForce(True, 0.0, tuple(waits_s), "all that is charged is within the budget")
        worst_w = max(over_w.values())
        where = ", ".join(map(domain_name, over_w))
        whom = ", ".join(f"{name} ({wait_s:.1f} s)" for name, wait_s in list(waits_s.items())[:5])
        whom = whom or "nobody: see the replicas whose limits cannot be lowered"
        return InForce(False, worst_w, tuple(waits_s), f"{where} up to {worst_w:.0f} W over; waiting for {whom}")

    def replicas(self, now_s: float) -> tuple[ReplicaView, ...]:
        """Every replica, in order of arrival."""
        return tuple(self.replica(name, now_s) for name in self._reservations.replicas)

    def replica(self, replica_id: str, now_s: float) -> ReplicaView:
        """One replica; `KeyError` where it is not known.

        One that cannot be moved has what is reserved for it as its least and most charge.
        """
        replica = self._reservations.replicas[replica_id]
        node, terms, config = replica.node, replica.terms, self.config
        fixed = why_fixed(replica, now_s, config.silent_s, config.confirm_s) if replica.gpus else None
        stays = fixed is not None and replica.may_set
        reasons = (replica.grant.reason, fixed, self._waiting.get(replica_id))
        return ReplicaView(
            replica_id=replica.replica_id,
            node_id=node.info.node_id,
            domain=node.info.domain,
            uuids=tuple(gpu.info.uuid for gpu in replica.gpus),
            num_gpus=replica.num_gpus,
            node_gpus=len(node.gpus),
            min_limit_w=terms.min_limit_w,
            max_limit_w=terms.max_limit_w,
            least_charge_w=replica.reserved_w if stays else terms.least_charge_w,
            most_charge_w=replica.reserved_w if stays else terms.most_charge_w,
            grant_w=replica.grant.charge_w,
            charge_w=replica.charge_w(gpu.limit_w for gpu in replica.gpus) if replica.gpus else 0.0,
            reserved_w=replica.reserved_w,
            overhead=node.info.overhead,
            confirmed=replica.confirmed,
            silent=node.lost or not replica.answers(now_s, config.silent_s),
            fixed=fixed is not None,
            may_set=replica.may_set,
            reason="; ".join(reason for reason in reasons if reason),
        )

    def terms(self, replica_id: str) -> ChargeTerms:
        """How a replica's GPUs are charged; `KeyError` where it is not known."""
        return self._reservations.replicas[replica_id].terms

    def lowers(self, grant: Grant) -> bool:
        """Whether a grant is for no more than the limit last read on each GPU of its replica."""
        replica = self._reservations.replicas[grant.replica_id]
        return all(replica.terms.cap_w(grant.charge_w) <= gpu.limit_w for gpu in replica.gpus)

    def parked_charge_w(self, now_s: float) -> dict[str | None, float]:
        """What free GPUs are going to be charged, by domain (None: outside any), W: for a policy's snapshot."""
        charges_w: dict[str | None, float] = {}
        for node in self._reservations.nodes.values():
            parked_w = feasible_charges.parked_plan_w(node, now_s, self.config.confirm_s)
            charges_w[node.info.domain] = charges_w.get(node.info.domain, 0.0) + parked_w
        return charges_w

    def snapshot(self, replicas: Iterable[ReplicaSnapshot], now_s: float) -> FleetSnapshot:
        """What a policy decides on: these replicas, with the watts that may be divided (less the reserve)."""
        return FleetSnapshot(
            now_s=now_s,
            budget_w=self.budget_w - self.config.reserve_w,
            replicas=tuple(replicas),
            domains=self.domains(),
            parked_charge_w=self.parked_charge_w(now_s),
        )

    def reserved_w(self, domain: str | None = None) -> float:
        """All that is reserved in a domain (None: the fleet), parked GPUs included, W."""
        return self._reservations.reserved_w[domain]

    def domains(self) -> tuple[Domain, ...]:
        """The domains with their present budgets."""
        return tuple(
            replace(domain, budget_w=self._reservations.budgets_w[name])
            for name, domain in self._reservations.domains.items()
        )

    def nodes(self) -> tuple[NodeView, ...]:
        """Every node with its free and unmanaged GPUs."""
        return tuple(
            NodeView(
                node_id=node.info.node_id,
                domain=node.info.domain,
                overhead=node.info.overhead,
                num_gpus=len(node.gpus),
                free=tuple(gpu.info.uuid for gpu in node.free),
                parked=tuple(gpu.info.uuid for gpu in node.free if gpu.parked),
                unmanaged=node.info.unmanaged,
                parked_charge_w=node.parked_w,
                joined=node.joined,
                lost=node.lost,
                replicas=tuple(node.replicas),
            )
            for node in self._reservations.nodes.values()
        )

    def unenforced(self, now_s: float) -> str | None:
        """Why the budget cannot be enforced (limits that may not be set exceed it), or None."""
        strict = feasible_charges.needed_w(self._reservations, now_s, replace(self.config, allow_unenforced=False))
        for name, budget_w in self._reservations.budgets_w.items():
            if self.config.allow_unenforced and strict[name] > budget_w + EPS_W:
                held = f"{domain_name(name)} at {strict[name]:.0f} W of {budget_w:.0f} W"
                return f"UNENFORCED: limits that may not be set hold {held}"
        return None
