"""A replica's menu: what each further watt is predicted to be worth, by its model, target and demand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pals_ray.control.replica.attainment import QueueingModel, kept_pace, paced_by
from pals_ray.control.replica.batch_choice import pinned_column, with_batch_limits
from pals_ray.control.replica.candidates import LATE_TOKEN, wanted_tokens_per_s
from pals_ray.control.replica.prediction import Surface
from pals_ray.control.snapshot import Arrivals, ReplicaSnapshot
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
    part of what is wanted that is good, 1 where the SLO is kept, at `cap_w` and `batch_limit`. `floor` is the point of
    the least grant (minimum share, TTFT, burst floor), `most_extra_w` what may be granted, `wanted_tokens_per_s` what
    share 1 means.
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

    Each point has the batch limit that the agent would choose there, or `pin_batch_limit`.
    """
    slo, caps = replica.target.slo, np.arange(len(on.cap_w))
    most_batch = replica.max_batch if pin_batch_limit is None else max(pin_batch_limit, 1)
    arrivals = _arrivals(replica, float(on.capacity_tokens_per_s[:, on.batch <= most_batch].max()))
    wanted = wanted_tokens_per_s(arrivals.tokens_per_s, target_tokens_per_s)
    planned = arrivals.times(wanted / max(arrivals.tokens_per_s, 1e-9))
    queue = QueueingModel.of(on, planned, slo)
    if pin_batch_limit is None:
        chosen, found = with_batch_limits(queue, planned, replica.max_batch)
    else:
        chosen = np.full(len(caps), pinned_column(on.batch, pin_batch_limit))
        found = queue.attained(chosen, planned)
    capacity, honours = on.capacity_tokens_per_s[caps, chosen], on.honours_cap[caps, chosen]
    share = np.minimum(found.good_share / slo.attainment, 1.0) if wanted > 0 else np.ones(len(caps))
    if paced_by(replica.target, wanted):
        share = share * kept_pace(on, found.running, float(on.itl_p99_s[-1, -1]))
    power_w = found.power_w

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
    busy = min(arrivals.tokens_per_s / max(float(on.capacity_tokens_per_s[0, 0]), 1e-9), 1.0)
    paid = np.ones_like(share)
    paid[0] = 1.0 - busy * (1.0 - replica.least_charge_w / max(float(charge_w[0]), replica.least_charge_w))
    served = np.minimum(capacity, wanted)
    value = replica.target.weight * (share * wanted + LATE_TOKEN * served) * paid
    value = value - VALUE_PER_W * (replica.least_charge_w + extra_w)
    floor = _floor(replica, on, share[kept], extra_w[kept], wanted > 0)
    return ReplicaMenu(
        extra_w[kept], value[kept], share[kept], on.cap_w[kept], on.batch[chosen][kept], floor, most_extra_w, wanted
    )


def _arrivals(replica: ReplicaSnapshot, most_tokens_per_s: float) -> Arrivals:
    """What comes, and with it those that wait: within the time that those running, half done on average, still take.

    Before it is known as much as the replica can serve is taken to come.
    """
    if replica.parked:
        return Arrivals(0.0, 1.0)
    if replica.arrivals is None:
        return Arrivals(most_tokens_per_s, 1.0)
    seen = replica.telemetry
    queue = 1.0 + 2.0 * seen.waiting / max(seen.running, 1)
    return replica.arrivals.times(queue)


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
        if replica.target.slo.ttft_s is not None:
            wished.append(np.flatnonzero((on.ttft_p50_s <= replica.target.slo.ttft_s).any(axis=1)))
    last = len(extra_w) - 1
    return 0 if replica.parked else min(max((int(points[0]) for points in wished if len(points)), default=0), last)
