"""The grants of a manager: ordering a charge, how far it may rise, and what an agent's reports confirm."""

from __future__ import annotations

from pals_ray.control.charge import EPS_W
from pals_ray.control.ledger.feasible_charges import WantedCharge
from pals_ray.control.ledger.reservations import SAME_LIMIT_W, Replica, Reservations, readings_w
from pals_ray.control.messages import AgentReport
from pals_ray.control.snapshot import Share
from pals_ray.types import Grant


class GrantIssuer:
    """Issues the grants of one manager (`epoch`), each leased for `lease_s`."""

    def __init__(self, reservations: Reservations, epoch: int, lease_s: float, least_raise_w: float) -> None:
        self._reservations = reservations
        self._epoch = epoch
        self._lease_s = lease_s
        self._least_raise_w = least_raise_w

    def issue(self, replica: Replica, charge_w: float, reason: str, now_s: float, share: Share | None = None) -> Grant:
        """Order a charge. Its watts are reserved at once, those of earlier grants until this one is confirmed."""
        pins = share if share is not None else replica.grant
        replica.grant = Grant(
            replica_id=replica.replica_id,
            epoch=self._epoch,
            seq=self._reservations.next_seq(),
            charge_w=charge_w,
            lease_s=self._lease_s,
            reason=reason,
            pin_cap_w=pins.pin_cap_w,
            pin_batch_limit=pins.pin_batch_limit,
            parked=pins.parked,
        )
        before_w = replica.reserved_w
        replica.add_order(replica.grant.seq, replica.cap_w)
        replica.confirmed = False
        self._reservations.recharge(replica)
        if replica.reserved_w > before_w + EPS_W:
            self._reservations.unsaved = True
        _note_cut(replica, now_s)
        return replica.grant

    def issue_in_force(self, replica: Replica, now_s: float, reason: str, lowest_w: float) -> Grant:
        """Grant no more than before, nor than what all GPUs have in force (`lowest_w`, W): so no limit rises."""
        terms = replica.terms
        cap_w = max(min(lowest_w, terms.max_limit_w), terms.min_limit_w)
        charge_w = max(min(replica.grant.charge_w, terms.charge_w(cap_w)), terms.least_charge_w)
        return self.issue(replica, charge_w, reason, now_s)

    def raise_towards(self, want: WantedCharge, now_s: float) -> tuple[Grant | None, str | None]:
        """Raise a replica as far as free watts allow, or only change its pins; and why no further, or None."""
        replica, share, grant = want.replica, want.share, want.replica.grant
        charge_w, why_not = grant.charge_w, None
        if want.target_w > grant.charge_w + EPS_W:
            charge_w, why_not = self._affordable(want)
        repinned = share is not None and share.pins != (grant.pin_cap_w, grant.pin_batch_limit, grant.parked)
        if charge_w <= grant.charge_w + EPS_W and not repinned:
            return None, why_not
        reason = want.reason if why_not is None else f"{want.reason}; {why_not}"
        return self.issue(replica, charge_w, reason, now_s, share), why_not

    def renew_expired(self, replica: Replica, now_s: float) -> None:
        """Give an agent whose lease has ended a newer grant of the same charge, whose watts were reserved all along."""
        # It raises a cap, though on no new watts. A superseded manager, which can no longer save, must not send it.
        self._reservations.unsaved = True
        if self._reservations.room_w(replica.node) >= -EPS_W:
            self.issue(replica, replica.grant.charge_w, "its lease had ended: granted anew", now_s)
        else:
            lowest_w = min((gpu.limit_w for gpu in replica.gpus), default=0.0)
            self.issue_in_force(replica, now_s, "its lease had ended, and the fleet is over its budget", lowest_w)

    def note_report(self, replica: Replica, report: AgentReport, now_s: float) -> None:
        """Note which grant a replica's agent obeys, and the limits in force."""
        epoch, seq = report.obeyed
        if epoch == self._epoch:
            replica.forget_orders_before(seq)
        limits_w = readings_w(report.limits_w)
        for gpu in replica.gpus:
            gpu.limit_w = limits_w.get(gpu.info.uuid, gpu.limit_w)
        settable_w = [gpu.limit_w for gpu in replica.gpus if gpu.info.may_set]
        highest_w, lowest_w = max(settable_w, default=0.0), min(settable_w, default=0.0)
        replica.confirmed = (
            report.obeyed == (self._epoch, replica.grant.seq)
            and all(gpu.info.uuid in limits_w for gpu in replica.gpus)
            and highest_w <= replica.cap_w + SAME_LIMIT_W
            and highest_w - lowest_w <= SAME_LIMIT_W
        )
        self._reservations.recharge(replica)
        _note_cut(replica, now_s)

    def _affordable(self, want: WantedCharge) -> tuple[float, str | None]:
        """How far a replica's charge may rise now, W, and why no further (None: all the way)."""
        replica, now_w = want.replica, want.replica.grant.charge_w
        if want.fixed is not None and (replica.may_set or replica.node.lost):
            return now_w, want.fixed
        if not any(gpu.info.may_set for gpu in replica.gpus):
            # Where no cap can be set the grant needs no watts: it only tells the agent how large a batch to run.
            return want.target_w, None
        if not replica.confirmed:
            return now_w, "its present grant is not in force on all its GPUs yet"
        free_w = self._reservations.room_w(replica.node)
        charge_w = min(want.target_w, replica.reserved_w + free_w)
        if charge_w >= want.target_w - EPS_W:
            return want.target_w, None
        if charge_w - now_w < self._least_raise_w:
            return now_w, f"waiting for watts that others have yet to release ({free_w:.0f} W free)"
        return charge_w, f"{charge_w:.0f} of {want.target_w:.0f} W so far: the rest is not released yet"


def _note_cut(replica: Replica, now_s: float) -> None:
    """Note since when a GPU may have more than its replica's grant allows, which is a cut not confirmed yet."""
    most_w = replica.cap_w + SAME_LIMIT_W
    if not any(replica.bound_w(gpu) > most_w for gpu in replica.gpus if gpu.info.may_set):
        replica.waiting_since_s = None
    elif replica.waiting_since_s is None:
        replica.waiting_since_s = now_s
