"""What a replica could do at each cap it may have: with its batch limit, what it serves and what it draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pals_ray.control.replica.attainment import QueueingModel, kept_pace, paced_by
from pals_ray.control.replica.batch_choice import EPS, pinned_column, with_batch_limits
from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Situation
from pals_ray.control.replica.prediction import Surface
from pals_ray.control.replica.slo_feedback import SPEND
from pals_ray.control.snapshot import Arrivals
from pals_ray.models.power_model import FloatArray

#: What a late token counts beside a good one: where hardly any can be good, more of them are still worth a watt.
LATE_TOKEN = 1e-3
#: A device's range is divided into at most so many caps, beside the ceiling and those around the present cap.
CAP_STEPS = 25


def cap_axis_w(min_limit_w: float, ceiling_w: float, max_limit_w: float, present_w: float) -> FloatArray:
    """The caps to choose from, W, ascending: whole-watt steps of a 25th of the device's range up to the ceiling.

    Steps are finer around the present cap, where feedback settles; ceiling and present cap are among them.
    """
    step_w = max(1.0, float(np.ceil((max_limit_w - min_limit_w) / CAP_STEPS)))
    grid = np.arange(min_limit_w, ceiling_w, step_w)
    near = np.round(np.array([-step_w / 2, -step_w / 4, -step_w / 8, 0.0, step_w / 8, step_w / 4, step_w / 2]))
    around = np.minimum(np.maximum(present_w + near, min_limit_w), ceiling_w)
    axis = np.sort(np.concatenate((grid, around, [ceiling_w])))
    # This does what `np.unique` does in a fifth of its time: it runs on every beat of every agent.
    return np.asarray(axis[np.concatenate(([True], axis[1:] > axis[:-1]))])


@dataclass(frozen=True, slots=True)
class Candidates:
    """One candidate per cap, (C,) each: its `batch_limit`, the sequences `running` then, and what comes of it.

    `score` is 1 where the targets are kept, and the smaller the worse the miss. `power_w` is GPU watts of the group,
    `joules_per_token` what a token served takes at node level, `attainment` the predicted share of good requests.
    """

    cap_w: FloatArray
    batch_limit: FloatArray
    running: FloatArray
    capacity_tokens_per_s: FloatArray
    attainment: FloatArray
    score: FloatArray
    power_w: FloatArray
    joules_per_token: FloatArray

    def best(self) -> int:
        """Of those that keep the targets the one with the fewest joules a token, which is that with the least watts
        where all of them serve all that comes; if none does, the least miss."""
        keeps = self.score >= 1.0 - EPS
        if not keeps.any():
            keeps = self.score >= (1.0 - 1e-3) * self.score.max()
        return int(np.where(keeps, self.joules_per_token, np.inf).argmin())


def candidates(
    queue: QueueingModel,
    arrivals: Arrivals,
    state: ControllerState,
    seen: Situation,
    config: ControllerConfig,
) -> Candidates:
    """The candidates for what arrives."""
    on, slo, target = queue.on, queue.slo, seen.target.throughput_tokens_per_s
    wanted = wanted_tokens_per_s(arrivals.tokens_per_s, target)
    caps = np.arange(len(on.cap_w))
    share = min(wanted / max(arrivals.tokens_per_s, EPS), 1.0)
    planned = arrivals.times(share * state.need)
    if seen.pin_batch_limit is None:
        column, found = with_batch_limits(queue, planned, float(state.kv_limit or seen.max_batch))
    else:
        column = np.full(len(caps), pinned_column(on.batch, seen.pin_batch_limit))
        found = queue.attained(column, planned)
    capacity = on.capacity_tokens_per_s[caps, column]
    drains = np.minimum(capacity / max(_to_serve_now(arrivals, wanted, state, seen), EPS), 1.0)
    # Demand swings, a target does not.
    needed = wanted_tokens_per_s((1.0 + config.margin) * arrivals.tokens_per_s, target) * state.need
    served = np.minimum(capacity / max(needed, EPS), 1.0) * drains
    served *= _pace(on, found.running, seen, wanted) * _present(queue, seen)

    # Tokens beyond a target are served all the same, as long as watts are well spent on them.
    comes = found if share == 1.0 else queue.attained(column, arrivals)
    overhead, terms = seen.terms.overhead, seen.terms
    node_w = (1.0 + overhead.b) * comes.power_w + overhead.charge_w(0.0, terms.num_gpus, terms.node_gpus)
    keeps = (found.attainment >= 1.0 - SPEND * (1.0 - slo.attainment)) & (served >= 1.0 - EPS) | (wanted == 0.0)
    return Candidates(
        cap_w=on.cap_w,
        batch_limit=on.batch[column],
        running=comes.running,
        capacity_tokens_per_s=capacity,
        attainment=found.attainment,
        score=np.where(keeps, 1.0, 0.999 * (found.good_share + LATE_TOKEN) / (1.0 + LATE_TOKEN) * served),
        power_w=comes.power_w,
        joules_per_token=node_w / np.maximum(np.minimum(capacity, arrivals.tokens_per_s), 1.0),
    )


def wanted_tokens_per_s(demand_tokens_per_s: float, target_tokens_per_s: float | None) -> float:
    """What is to be served: all demand, or the target where that is less."""
    return demand_tokens_per_s if target_tokens_per_s is None else min(demand_tokens_per_s, target_tokens_per_s)


def _to_serve_now(arrivals: Arrivals, wanted: float, state: ControllerState, seen: Situation) -> float:
    """Tokens/s to be served while requests wait: enough that the last of them starts within half its TTFT limit, and
    where there is none within the time that those running, half done on average, still take."""
    waiting, limit_s = seen.telemetry.waiting, seen.target.slo.ttft_s
    # Under a tokens/s target those beyond it wait as they may.
    if waiting == 0 or state.queue_since_s is None or seen.target.throughput_tokens_per_s is not None:
        return 0.0
    if limit_s is not None:
        return waiting * arrivals.output_tokens / (0.5 * limit_s)
    return wanted * (1.0 + 2.0 * waiting / max(seen.telemetry.running, 1))


def _present(queue: QueueingModel, seen: Situation) -> FloatArray:
    """(C,): 1, or less where those that run now get their tokens later than the TPOT limit allows."""
    running, limit_s, batch = seen.telemetry.running_mean, queue.slo.tpot_s, queue.on.batch
    if limit_s is None or running <= 1.0:
        return np.ones(len(queue.tpot_s))
    right = min(int(np.searchsorted(batch, running)), len(batch) - 1)
    left = max(right - 1, 0)
    part = min(max((running - batch[left]) / max(batch[right] - batch[left], EPS), 0.0), 1.0)
    tpot_s = (1.0 - part) * queue.tpot_s[:, left] + part * queue.tpot_s[:, right]
    return np.asarray(np.minimum(limit_s / tpot_s, 1.0))


def _pace(on: Surface, running: FloatArray, seen: Situation, wanted: float) -> FloatArray:
    """(C,): `kept_pace` of the points, where only that says how slow a replica may become; else 1."""
    if paced_by(seen.target, wanted) and seen.model is not None:
        slowest_s = float(seen.model.predict(seen.terms.max_limit_w, seen.max_batch).itl_p99_s)
        return kept_pace(on, np.maximum(running, seen.telemetry.running), slowest_s)
    return np.ones_like(running)
