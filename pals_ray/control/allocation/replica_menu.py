"""A replica's menu: what each further watt is predicted to be worth, by its model, target and demand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pals_ray.control.replica.batch_choice import best_batch, implied_batch, pinned_column, served_share
from pals_ray.control.replica.demand_feedback import demand_with_queue_tokens_per_s
from pals_ray.control.replica.prediction import BUSY_SIGMAS, Surface, latency_score
from pals_ray.control.snapshot import ReplicaSnapshot, TailFactors
from pals_ray.models.power_model import FloatArray

#: A grant is at most the natural draw x (1 + HEADROOM); a replica whose cap binds there may ask for STEP of its range.
HEADROOM = 0.1
STEP = 0.05
#: Share of samples with the cap binding from which on it counts as binding.
BINDING = 0.5
#: What a watt costs, so that of two points that serve the same the cheaper is worth more.
VALUE_PER_W = 1e-6


@dataclass(frozen=True, slots=True)
class ReplicaMenu:
    """A replica's points by rising charge, (C,) each.

    `extra_w` is whole watts above the least charge, `value` as in ARCHITECTURE.md's Words, `share` the predicted
    served / wanted (latency misses taken off), at `cap_w` and `batch_limit`. `floor` is the point of the least grant
    (minimum share, TTFT, burst floor), `most_extra_w` what may be granted, `wanted_tokens_per_s` what share 1 means.
    """

    extra_w: FloatArray
    value: FloatArray
    share: FloatArray
    cap_w: FloatArray
    batch_limit: FloatArray
    floor: int
    most_extra_w: float
    wanted_tokens_per_s: float


def replica_menu(
    replica: ReplicaSnapshot, on: Surface, target_tokens_per_s: float | None, pin_batch_limit: int | None = None
) -> ReplicaMenu:
    """The menu of a replica whose part of its model's target is `target_tokens_per_s` (None: all its demand).

    The batch is the least that serves the demand (Little's law), or a smaller one where that is worth more under the
    latency limits; with `pin_batch_limit` only what the demand makes of that limit.
    """
    arriving = np.inf if replica.demand_tokens_per_s is None else replica.demand_tokens_per_s
    demand = 0.0 if replica.parked else demand_with_queue_tokens_per_s(arriving, replica.telemetry, on)
    wanted = min(demand, np.inf if target_tokens_per_s is None else target_tokens_per_s)
    wanted = float(on.capacity_tokens_per_s[-1].max()) if np.isinf(wanted) else wanted
    share = served_share(on, wanted, latency_score(replica.target, _planned(on, demand, replica.tails)))
    if pin_batch_limit is None:
        chosen = best_batch(on, demand, wanted, share, may_wait=replica.target.ttft_p99_s is None)
    else:
        chosen = np.minimum(implied_batch(on, demand), pinned_column(on, pin_batch_limit))
    caps = np.arange(len(on.cap_w))
    share, power_w, honours = share[caps, chosen], on.power_w[caps, chosen], on.honours_cap[caps, chosen]

    gpu_w = np.where(honours, replica.num_gpus * on.cap_w, np.maximum(replica.num_gpus * on.cap_w, power_w))
    charge_w = (1 + replica.overhead.b) * gpu_w + replica.overhead.charge_w(0.0, replica.num_gpus, replica.node_gpus)
    extra_w = np.ceil(np.maximum.accumulate(charge_w) - replica.least_charge_w - 1e-6)
    extra_w = np.clip(extra_w, 0.0, np.floor(replica.most_charge_w - replica.least_charge_w))
    extra_w[0] = 0.0
    # The natural draw is predicted for the demand's batch; a measured one, with prefill in it, counts if it is higher.
    natural_w = max(float(power_w[-1]), replica.natural_draw_w or 0.0)
    most_extra_w = float(np.floor(most_charge_w(replica, natural_w) - replica.least_charge_w))
    last = int(np.searchsorted(extra_w, most_extra_w, side="right")) - 1
    kept = np.minimum(caps, last)
    # Below the clock floor's draw a cap is charged less than the replica draws, at other replicas' expense. There the
    # value counts only in proportion to the charge, or the lowest cap would always seem best. A replica that one
    # sequence at a time keeps only partly busy draws that much for only a part of the time.
    busy = min(demand / max(float(on.capacity_tokens_per_s[0, 0]), 1e-9), 1.0)
    paid = np.ones_like(share)
    paid[0] = 1.0 - busy * (1.0 - replica.least_charge_w / max(float(charge_w[0]), replica.least_charge_w))
    value = replica.target.weight * share * paid - VALUE_PER_W * (replica.least_charge_w + extra_w)
    floor = _floor(replica, on, share[kept], extra_w[kept], demand > 0)
    return ReplicaMenu(
        extra_w[kept], value[kept], share[kept], on.cap_w[kept], on.batch[chosen][kept], floor, most_extra_w, wanted
    )


def _planned(on: Surface, demand: float, tails: TailFactors) -> Surface:
    """A surface with the latencies that the agent plans with, its feedback included.

    Where a batch serves the demand they are those of busy moments, and where it does not, those of the full batch.
    """
    busy = np.minimum(np.searchsorted(on.batch, on.batch + BUSY_SIGMAS * np.sqrt(on.batch)), len(on.batch) - 1)
    column = np.where(on.capacity_tokens_per_s >= demand, busy, np.arange(len(on.batch)))
    itl_s, ttft_s = (np.take_along_axis(values, column, axis=1) for values in (on.itl_p99_s, on.ttft_p99_s))
    return replace(on, itl_p99_s=tails.itl * itl_s, ttft_p99_s=tails.ttft * ttft_s)


def most_charge_w(replica: ReplicaSnapshot, natural_draw_w: float) -> float:
    """The most that a replica is granted, W: natural draw (GPU watts) x (1 + headroom), a step more where that binds.

    It is at least the burst floor, and never outside the replica's least and most charge.
    """
    if replica.parked:
        return replica.least_charge_w
    charge_w = replica.overhead.charge_w(natural_draw_w * (1 + HEADROOM), replica.num_gpus, replica.node_gpus)
    if replica.telemetry.binding_share >= BINDING:
        charge_w = max(charge_w, replica.grant_w + STEP * (replica.most_charge_w - replica.least_charge_w))
    charge_w = max(charge_w, replica.target.burst_floor_w, replica.least_charge_w)
    return min(charge_w, replica.most_charge_w)


def _floor(replica: ReplicaSnapshot, on: Surface, share: FloatArray, extra_w: FloatArray, has_demand: bool) -> int:
    """The first point that gives the burst floor and, with demand, the minimum share and a TTFT that can be met."""
    wished = [np.flatnonzero(extra_w >= min(replica.target.burst_floor_w - replica.least_charge_w, extra_w[-1]))]
    if has_demand:
        wished.append(np.flatnonzero(share >= min(replica.target.min_share, share.max())))
        if replica.target.ttft_p99_s is not None:
            wished.append(np.flatnonzero((on.ttft_p99_s <= replica.target.ttft_p99_s).any(axis=1)))
    last = len(extra_w) - 1
    return 0 if replica.parked else min(max((int(points[0]) for points in wished if len(points)), default=0), last)
