"""What a replica could do at each cap it may have: with its best batch limit, what it serves and what it draws."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pals_ray.control.replica.batch_choice import EPS, IntArray, batch_limits, implied_batch, pinned_column
from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Situation
from pals_ray.control.replica.prediction import BUSY_SIGMAS, Surface
from pals_ray.models.power_model import FloatArray
from pals_ray.types import Target

#: A device's range is divided into at most so many caps, beside the ceiling and those around the present cap.
CAP_STEPS = 50


def cap_axis_w(min_limit_w: float, ceiling_w: float, max_limit_w: float, present_w: float) -> FloatArray:
    """The caps to choose from, W, ascending: whole-watt steps of a 50th of the device's range up to the ceiling.

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

    `score` is 1 where all that is wanted is served within the limits, and the smaller the worse the miss. `power_w` is
    GPU watts of the group.
    """

    cap_w: FloatArray
    batch_limit: FloatArray
    running: FloatArray
    capacity_tokens_per_s: FloatArray
    score: FloatArray
    power_w: FloatArray
    itl_p99_s: FloatArray
    ttft_p99_s: FloatArray

    def best(self) -> int:
        """Of those that serve what is wanted the one with the least watts; if none does, the least miss."""
        serves = self.score >= 1.0 - EPS
        if not serves.any():
            serves = self.score >= self.score.max() - EPS
        return int(np.where(serves, self.power_w, np.inf).argmin())


def candidates(
    on: Surface, demand: float, wanted: float, state: ControllerState, seen: Situation, config: ControllerConfig
) -> Candidates:
    """The candidates for a demand and what of it is wanted, tokens/s, with latencies as in busy moments.

    `batch_limits` chooses each cap's batch limit, unless the grant pins it. The part of the demand by which the model
    explains the sequences that run tells how many are going to run. A p99 ITL above `_slowest_itl_s`, with the mean of
    what is going to run or with what runs now, lowers a cap's score, but no batch limit.
    """
    caps = np.arange(len(on.cap_w))
    target = _planned(seen.target, config.planned_limit_share) if demand > 0 else Target()
    if seen.pin_batch_limit is None:
        most_batch = float(state.kv_limit or seen.max_batch)
        column = batch_limits(on, demand, wanted, target, most_batch=most_batch, most_loss=config.most_capacity_loss)
    else:
        column = np.full(len(caps), pinned_column(on, seen.pin_batch_limit))
    demand = min(demand * state.modelled_share, demand)
    run = np.minimum(implied_batch(on, demand), column)
    # Between two graph sizes lies the batch that just serves the demand: watts must not jump from size to size.
    before = np.maximum(run - 1, 0)
    low, high = on.capacity_tokens_per_s[caps, before], on.capacity_tokens_per_s[caps, run]
    part = (
        np.clip((demand - low) / np.maximum(high - low, EPS), 0.0, 1.0) if np.isfinite(demand) else np.ones(len(caps))
    )
    running = on.batch[before] + part * (on.batch[run] - on.batch[before])

    def between(values: FloatArray, lower: IntArray, upper: IntArray, part: FloatArray) -> FloatArray:
        """(C,): interpolate (C, B) values between two columns of each cap."""
        low, high = values[caps, lower], values[caps, upper]
        return np.asarray(low + part * (high - low))

    # The number running varies as a Poisson number does, and it is in busy moments that latencies miss their limits.
    busy = np.minimum(running + BUSY_SIGMAS * np.sqrt(running), on.batch[column])
    above = np.minimum(np.searchsorted(on.batch, busy), len(on.batch) - 1)
    below = np.maximum(above - 1, 0)
    way = (busy - on.batch[below]) / np.maximum(on.batch[above] - on.batch[below], EPS)
    ttft_s, itl_s = (between(values, below, above, way) for values in (on.ttft_p99_s, on.itl_p99_s))

    score = np.minimum(on.capacity_tokens_per_s[caps, column], wanted) / wanted if wanted > 0 else np.ones(len(caps))
    if target.itl_p99_s is not None:
        score = score * target.itl_p99_s / np.maximum(itl_s, target.itl_p99_s)
    # No limit is at stake here, so the means count: a busy moment that may come is not paid for beforehand.
    now = np.minimum(np.searchsorted(on.batch, seen.telemetry.running), column)
    mean_itl_s = between(on.itl_p99_s, before, run, part)
    slowest_itl_s = _slowest_itl_s(seen, wanted, state.itl.factor)
    score = score * np.minimum(slowest_itl_s / np.maximum(mean_itl_s, on.itl_p99_s[caps, now]), 1.0)
    if target.ttft_p99_s is not None:
        # Once the batch is full, new requests wait for one to end.
        places = on.batch[column] / (running + BUSY_SIGMAS * np.sqrt(running))
        score = score * target.ttft_p99_s / np.maximum(ttft_s, target.ttft_p99_s) * np.minimum(places, 1.0)
    return Candidates(
        cap_w=on.cap_w,
        batch_limit=on.batch[column],
        running=running,
        capacity_tokens_per_s=on.capacity_tokens_per_s[caps, column],
        score=score,
        power_w=between(on.power_w, before, run, part),
        itl_p99_s=itl_s,
        ttft_p99_s=ttft_s,
    )


def _planned(target: Target, share: float) -> Target:
    """The target with the latency limits to plan for, which are a little tighter."""
    ttft_s, itl_s = (limit_s and share * limit_s for limit_s in (target.ttft_p99_s, target.itl_p99_s))
    return replace(target, ttft_p99_s=ttft_s, itl_p99_s=itl_s)


def _slowest_itl_s(seen: Situation, wanted: float, factor: float) -> float:
    """The highest p99 ITL that a cap may cause, s, where all demand is to be served and no ITL limit is given.

    It is that of a full batch at the highest cap, which the engine was started for. Clients that wait for an answer
    before they ask again send less to a slower replica, so without this each cut of the cap would justify the next.
    `factor` is the feedback on the model's ITL.
    """
    target = seen.target
    targeted = target.throughput_tokens_per_s is not None and wanted >= target.throughput_tokens_per_s
    if target.itl_p99_s is not None or targeted or wanted == 0.0 or seen.model is None:
        return np.inf
    return factor * float(seen.model.predict(seen.terms.max_limit_w, seen.max_batch).itl_p99_s)
