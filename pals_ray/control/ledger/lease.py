"""The lease of a grant, on the agent's side: what to obey, for how long, and how far the caps may go.

Pure: the agent passes in its own monotonic clock. In order:

    state = LeaseState()
    state = fence(state, reply.grant.epoch)              # whenever a manager makes itself known; then say Hello
    state, outcome, reason = accept(state, grant, now_s) # for every grant, pushed or in a reply
    state, reason = tick(state, now_s, in_force_w=..., fail_safe_w=...)  # every beat, before the point is chosen
    cap_w, reason = ceiling_w(state, terms)              # highest cap allowed now, the same for every GPU
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from pals_ray.control.charge import ChargeTerms
from pals_ray.types import Grant


class Outcome(StrEnum):
    """What an agent does with a grant that reached it."""

    OBEY = "obey"
    RENEW = "renew"
    IGNORE = "ignore"


@dataclass(frozen=True, slots=True)
class LeaseState:
    """What an agent remembers of its grant. Times are s of its monotonic clock.

    `grant` is the newest one obeyed; older ones, and all of epochs below `fence_epoch`, are never obeyed again.
    `fail_safe_w` is set while the lease has ended: the cap to stay under until a newer grant comes.
    """

    fence_epoch: int = 0
    grant: Grant | None = None
    ends_s: float = 0.0
    seen_s: float = 0.0
    fail_safe_w: float | None = None

    @property
    def expired(self) -> bool:
        """Whether the lease has ended without a newer grant."""
        return self.fail_safe_w is not None


def fence(state: LeaseState, epoch: int) -> LeaseState:
    """Obey no manager older than `epoch` from now on. The present grant holds until its lease ends."""
    return replace(state, fence_epoch=max(state.fence_epoch, epoch))


def accept(state: LeaseState, grant: Grant, now_s: float) -> tuple[LeaseState, Outcome, str]:
    """Whether to obey a grant: only an (epoch, seq) newer than any before is obeyed; the same one renews its lease.

    Once the lease has ended, only a newer grant counts. To restore the old one on a late renewal would be safe for the
    budget, because the ledger reserves its watts until a newer one is confirmed. But then a late message could raise a
    cap, which none ever may. The next report tells the manager of the expiry, and it issues a newer grant at once.
    """
    if not (math.isfinite(grant.charge_w) and math.isfinite(grant.lease_s) and grant.lease_s > 0.0):
        return state, Outcome.IGNORE, f"not a grant: {grant.charge_w} W for {grant.lease_s} s"
    if grant.epoch < state.fence_epoch:
        return state, Outcome.IGNORE, f"from an older manager (epoch {grant.epoch}, obeying {state.fence_epoch})"
    if state.grant is not None:
        if grant.replica_id != state.grant.replica_id:
            return state, Outcome.IGNORE, f"meant for {grant.replica_id}"
        held, got = (state.grant.epoch, state.grant.seq), (grant.epoch, grant.seq)
        if got < held:
            return state, Outcome.IGNORE, f"late: grant {got} after {held}"
        if got == held and state.expired:
            return state, Outcome.IGNORE, f"the lease of grant {held} has ended; only a newer grant counts"
        if got == held:
            return replace(state, ends_s=now_s + grant.lease_s, seen_s=now_s), Outcome.RENEW, "lease renewed"
    obeyed = LeaseState(
        fence_epoch=max(state.fence_epoch, grant.epoch), grant=grant, ends_s=now_s + grant.lease_s, seen_s=now_s
    )
    return obeyed, Outcome.OBEY, grant.reason


def tick(state: LeaseState, now_s: float, *, in_force_w: float, fail_safe_w: float) -> tuple[LeaseState, str]:
    """Let time pass. An ended lease means the lower of `fail_safe_w` and the lowest limit in force, W per GPU.

    A clock that went back has hidden an unknown time, so it ends the lease as well; a jump forward just ends it.
    """
    if state.grant is None:
        return state, "no grant yet"
    if state.expired:
        return replace(state, seen_s=now_s), "at the fail-safe cap: the lease has ended"
    if state.seen_s <= now_s < state.ends_s:
        return replace(state, seen_s=now_s), f"lease holds for another {state.ends_s - now_s:.1f} s"
    why = "the clock went back" if now_s < state.seen_s else "the lease ended"
    cap_w = min(fail_safe_w, in_force_w)
    return replace(state, seen_s=now_s, fail_safe_w=cap_w), f"{why} without a word from the manager: {cap_w:g} W a GPU"


def ceiling_w(state: LeaseState, terms: ChargeTerms) -> tuple[float | None, str]:
    """The highest cap allowed on every GPU of the replica, W, inside the device's range; None before the first grant.

    None means: leave the limits as they are. A cap that the grant pins is never above what its charge pays for.
    """
    if state.grant is None:
        return None, "no grant yet: limits stay as they are"
    if state.fail_safe_w is not None:
        return min(max(state.fail_safe_w, terms.min_limit_w), terms.max_limit_w), "fail-safe: the lease has ended"
    cap_w = terms.cap_w(state.grant.charge_w)
    pin_w = state.grant.pin_cap_w
    if pin_w is not None and pin_w < cap_w:
        return max(pin_w, terms.min_limit_w), f"pinned: {state.grant.reason}"
    return cap_w, state.grant.reason
