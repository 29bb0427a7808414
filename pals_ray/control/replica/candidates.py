"""What a replica could do at each cap it may have: the batch limit that suits it, what it serves, at how many watts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pals_ray.control.replica.batch_choice import IntArray, best_batch, graph_sizes, implied_batch
from pals_ray.control.replica.prediction import BUSY_SIGMAS, Surface, latency_score, predict_at
from pals_ray.models.power_model import FloatArray, PowerModel
from pals_ray.types import Target

#: Caps asked of a model at a decision, at most, beside the ceiling and the present one.
CAP_STEPS = 50
#: So many there are always places for: a place too many costs hardly any ITL, each that is short a wait.
ROOM_SIGMAS = 4.0
#: Shares nearer than this are the same.
EPS = 1e-9


def cap_axis_w(min_limit_w: float, ceiling_w: float, max_limit_w: float, present_w: float) -> FloatArray:
    """The caps to choose from, W, ascending: whole-watt steps of a 50th of the device's range up to the ceiling, finer
    around the present cap, where feedback settles; ceiling and present cap are among them."""
    step_w = max(1.0, float(np.ceil((max_limit_w - min_limit_w) / CAP_STEPS)))
    grid = np.arange(min_limit_w, ceiling_w, step_w)
    near = np.round(np.array([-step_w / 2, -step_w / 4, -step_w / 8, 0.0, step_w / 8, step_w / 4, step_w / 2]))
    around = np.minimum(np.maximum(present_w + near, min_limit_w), ceiling_w)
    axis = np.sort(np.concatenate((grid, around, [ceiling_w])))
    # As `np.unique`, in a fifth of its time: this runs on every beat of every agent.
    return np.asarray(axis[np.concatenate(([True], axis[1:] > axis[:-1]))])


def ask_points(model: PowerModel, cap_w: FloatArray, max_batch: int) -> Surface:
    """The model's answers at these caps x all graph sizes up to `max_batch`, in one call."""
    return predict_at(model, cap_w, np.array(graph_sizes(max_batch), dtype=np.float64))


def corrected(on: Surface, need: float, itl: float, ttft: float) -> Surface:
    """A surface with capacity divided by `need`, and latencies times their factors."""
    return replace(
        on,
        capacity_tokens_per_s=on.capacity_tokens_per_s / need,
        itl_p99_s=on.itl_p99_s * itl,
        ttft_p99_s=on.ttft_p99_s * ttft,
    )


def _last(chosen: NDArray[np.bool_]) -> IntArray:
    """The last chosen column of each row of (C, B)."""
    return np.asarray(chosen.shape[1] - 1 - chosen[:, ::-1].argmax(axis=1))


@dataclass(frozen=True, slots=True)
class Points:
    """One candidate per cap, (C,) each: the `batch_limit` that suits it, sequences `running` then, what comes of it.

    `score` is 1 where all that is wanted is served within the limits, else the less the worse the miss. `power_w` is
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


def points(
    on: Surface,
    demand: float,
    wanted: float,
    target: Target,
    *,
    most_batch: float,
    pin_batch_limit: int | None,
    fall: float,
    likely: float | None = None,
    slowest_itl_s: float = np.inf,
    now_running: float = 0.0,
) -> Points:
    """The candidates for a demand and what of it is wanted, tokens/s.

    The limit of a cap is the largest batch within the ITL limit, not above `most_batch` (KV pressure), not where
    capacity has fallen by more than the share `fall` below what a smaller batch makes, and not so low that what is
    wanted would wait. TTFT does not lower it: a request that is not let in waits all the longer, so under a TTFT limit
    some places are kept free instead. Latencies are those of as many as run in a crowd.
    `likely` is the demand as the model takes it by the sequences
    that run for it: it tells how many are going to run. `pin_batch_limit` overrides all that. A p99 ITL above
    `slowest_itl_s`, with the mean of what is going to run or what runs now, makes a cap worse, but lowers no batch.
    """
    caps = np.arange(len(on.cap_w))
    itl_met = latency_score(replace(target, ttft_p99_s=None), on)
    share, implied, _ = best_batch(on, demand, wanted, itl_met)
    if pin_batch_limit is None:
        capacity = on.capacity_tokens_per_s
        fit = (capacity >= (1.0 - fall) * np.maximum.accumulate(capacity, axis=1)) & (on.batch <= max(most_batch, 1.0))
        allowed = fit & (share >= np.where(fit, share, -1.0).max(axis=1, keepdims=True) - EPS)
        column = _last(allowed)
        # Who is kept out waits: what is wanted is let in, and its swings.
        enough = on.capacity_tokens_per_s >= min(demand, wanted)
        need = on.batch[enough.argmax(axis=1)]
        room = np.searchsorted(on.batch, need + ROOM_SIGMAS * np.sqrt(need))
        # Where it is too much, those kept out miss the TTFT, and the queue lasts the longer the less is made of it.
        short = column if target.ttft_p99_s is None else _last(fit)
        column = np.where(enough.any(axis=1), np.minimum(np.maximum(column, room), _last(fit)), short)
    else:
        column = np.full(len(caps), max(int(np.searchsorted(on.batch, pin_batch_limit, side="right")) - 1, 0))
    if likely is not None:
        demand = min(likely, demand)
        implied = implied_batch(on, demand)
    run = np.minimum(implied, column)
    # Between two sizes the batch that serves the demand just so, so that watts do not jump from size to size.
    before = np.maximum(run - 1, 0)
    low, high = on.capacity_tokens_per_s[caps, before], on.capacity_tokens_per_s[caps, run]
    part = (
        np.clip((demand - low) / np.maximum(high - low, EPS), 0.0, 1.0) if np.isfinite(demand) else np.ones(len(caps))
    )
    running = on.batch[before] + part * (on.batch[run] - on.batch[before])

    def there(values: FloatArray) -> FloatArray:
        """Between the two sizes, as `running` is."""
        low, high = values[caps, before], values[caps, run]
        return np.asarray(low + part * (high - low))

    # What runs varies as a Poisson number does: the latencies of the crowd are those that miss.
    crowd = np.minimum(running + BUSY_SIGMAS * np.sqrt(running), on.batch[column])
    above = np.minimum(np.searchsorted(on.batch, crowd), len(on.batch) - 1)
    below = np.maximum(above - 1, 0)
    way = (crowd - on.batch[below]) / np.maximum(on.batch[above] - on.batch[below], EPS)

    def crowded_at(values: FloatArray) -> FloatArray:
        """Between the two sizes that the crowd lies between."""
        return np.asarray(values[caps, below] + way * (values[caps, above] - values[caps, below]))

    ttft_s, itl_s = crowded_at(on.ttft_p99_s), crowded_at(on.itl_p99_s)
    score = np.minimum(on.capacity_tokens_per_s[caps, column], wanted) / wanted if wanted > 0 else np.ones(len(caps))
    if target.itl_p99_s is not None:
        score = score * target.itl_p99_s / np.maximum(itl_s, target.itl_p99_s)
    # Nobody's tail is to be kept here, and what runs now is seen: a crowd that may come is not paid for beforehand.
    now = np.minimum(np.searchsorted(on.batch, now_running), column)
    score = score * np.minimum(slowest_itl_s / np.maximum(there(on.itl_p99_s), on.itl_p99_s[caps, now]), 1.0)
    if target.ttft_p99_s is not None:
        # Once all places are taken, requests wait for one to end.
        places = on.batch[column] / (running + BUSY_SIGMAS * np.sqrt(running))
        score = score * target.ttft_p99_s / np.maximum(ttft_s, target.ttft_p99_s) * np.minimum(places, 1.0)
    return Points(
        cap_w=on.cap_w,
        batch_limit=on.batch[column],
        running=running,
        capacity_tokens_per_s=on.capacity_tokens_per_s[caps, column],
        score=score,
        power_w=there(on.power_w),
        itl_p99_s=itl_s,
        ttft_p99_s=ttft_s,
    )
