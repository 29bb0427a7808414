"""From the charges that a policy wants to those that may be ordered: who can be moved, and what fits every budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pals_ray.control.charge import EPS_W
from pals_ray.control.ledger.reservations import Node, Replica, Reservations, domain_name
from pals_ray.control.snapshot import Share


@dataclass(frozen=True, slots=True)
class LedgerConfig:
    """The ledger's constants. Times in s of the manager's monotonic clock, watts at node level.

    After `silent_s` without a report, or `confirm_s` with a cut not confirmed, a replica counts as fixed: the others
    share what it leaves. `rebuild_s` is how long a new manager waits for the agents of the old one. A raise of less
    than `least_raise_w` is ordered only if it is the whole raise that is wanted.
    """

    reserve_w: float = 0.0
    lease_s: float = 5.0
    silent_s: float = 3.0
    confirm_s: float = 1.0
    rebuild_s: float = 10.0
    least_raise_w: float = 1.0
    allow_unenforced: bool = False


@dataclass(slots=True)
class WantedCharge:
    """What one replica is to have, W: its share, clamped to what its GPUs can do and shrunk to fit the budgets."""

    replica: Replica
    share: Share | None
    target_w: float
    least_w: float
    fixed: str | None
    reason: str


def why_fixed(replica: Replica, now_s: float, silent_s: float, confirm_s: float) -> str | None:
    """Why a replica cannot be brought to a grant at present; None where it can."""
    if replica.node.lost:
        return f"node {replica.node.info.node_id} is lost: its GPUs are charged as they were last known"
    silence_s = now_s - replica.heard_s
    if silence_s > silent_s and replica.session == 0:
        return f"its agent has not been heard since this manager started, {silence_s:.1f} s ago"
    if silence_s > silent_s:
        return f"its agent has been silent for {silence_s:.1f} s"
    if replica.waiting_since_s is not None and now_s - replica.waiting_since_s > confirm_s:
        return f"its grant has not been in force for {now_s - replica.waiting_since_s:.1f} s"
    if not replica.may_set:
        return "no permission to set its limits: charged the limits in force"
    return None


def parked_plan_w(node: Node, now_s: float, confirm_s: float) -> float:
    """What a node's free GPUs are going to be charged: their least, unless that has not been confirmed in time, W."""
    if node.lost or (node.unparked_since_s is not None and now_s - node.unparked_since_s > confirm_s):
        return node.parked_w
    return min(node.parked_w, node.parked_least_w())


def wanted_charges(
    reservations: Reservations, shares: Mapping[str, Share] | None, now_s: float, config: LedgerConfig, *, keep: bool
) -> list[WantedCharge]:
    """What each replica with GPUs is to have, in the order of `shares`, shrunk to fit all budgets.

    A replica without a share gets its least charge; with `keep`, or where there are no shares at all, its present one.
    """
    shares = shares or {}
    keep = keep or not shares
    found: list[WantedCharge] = []
    for name in dict.fromkeys((*shares, *reservations.replicas)):
        replica = reservations.replicas.get(name)
        if replica is None or not replica.gpus:
            continue
        share = shares.get(name)
        least_w = replica.terms.least_charge_w
        if share is not None:
            target_w, reason = share.charge_w, share.reason
        elif keep:
            target_w, reason = replica.grant.charge_w, "unchanged"
        else:
            target_w, reason = least_w, "no share from the policy: least charge"
        # Where no limit can be set a grant only guides the batch: there it may lie under what the caps cost.
        low_w = least_w if replica.may_set else 0.0
        target_w = min(max(target_w, low_w), replica.terms.most_charge_w)
        fixed = why_fixed(replica, now_s, config.silent_s, config.confirm_s)
        found.append(WantedCharge(replica, share, target_w, low_w, fixed, reason))
    _shrink(reservations, found, now_s, config)
    return found


def _shrink(reservations: Reservations, found: list[WantedCharge], now_s: float, config: LedgerConfig) -> None:
    """Shrink targets towards the least charges, in proportion, until every domain holds them, inner domains first."""
    room_w = dict(reservations.budgets_w)
    for node in reservations.nodes.values():
        parked_w = parked_plan_w(node, now_s, config.confirm_s)
        for name in node.chain:
            room_w[name] -= parked_w
    members: dict[str | None, list[WantedCharge]] = {name: [] for name in room_w}
    for want in found:
        for name in want.replica.node.chain:
            if want.fixed is None:
                members[name].append(want)
            else:
                room_w[name] -= want.replica.reserved_w
    for name in reservations.inner_first:
        total_w = sum(want.target_w for want in members[name])
        if total_w <= room_w[name] + EPS_W:
            continue
        least_w = sum(want.least_w for want in members[name])
        above_w = total_w - least_w
        factor = max(0.0, (room_w[name] - least_w) / above_w) if above_w > 0.0 else 0.0
        for want in members[name]:
            if want.target_w > want.least_w:
                want.target_w = want.least_w + factor * (want.target_w - want.least_w)
                left = f"{domain_name(name)} has {room_w[name]:.0f} W left"
                want.reason = f"{want.reason}; squeezed to {want.target_w:.1f} W: {left}"


def needed_w(reservations: Reservations, now_s: float, config: LedgerConfig) -> dict[str | None, float]:
    """The least budget of each domain (None: the fleet) that can be kept now, its reserve aside, W.

    Replicas that can be moved count at their least charge, the others at what is reserved for them; a silent one counts
    as fixed only after a whole lease. GPUs whose limit may not be set count as if it might be, where the operator
    allowed to run unenforced.
    """
    needed = dict.fromkeys(reservations.budgets_w, 0.0)
    for node in reservations.nodes.values():
        own_w = parked_plan_w(node, now_s, config.lease_s)
        free = node.free
        if config.allow_unenforced and not all(gpu.info.may_set for gpu in free):
            own_w = min(own_w, node.group_w(sum(gpu.occupied_w(gpu.info.min_limit_w) for gpu in free), len(free)))
        for replica in node.replicas.values():
            if not replica.gpus:
                continue
            fixed = why_fixed(replica, now_s, config.lease_s, config.lease_s) is not None
            stays = fixed and (replica.may_set or not config.allow_unenforced)
            own_w += replica.reserved_w if stays else replica.terms.least_charge_w
        for name in node.chain:
            needed[name] += own_w
    return needed
