"""How a replica's batch limit is chosen: from demand, latency limits and KV cache, among the engine's graph sizes."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Situation
from pals_ray.control.replica.prediction import Surface, latency_score
from pals_ray.models.power_model import FloatArray
from pals_ray.types import Target

IntArray = NDArray[np.intp]

#: Shares nearer than this are the same.
EPS = 1e-9
#: The limit leaves room for so many standard deviations more sequences than demand needs on average. A larger limit
#: hardly raises the ITL, while every sequence above the limit has to wait.
ROOM_SIGMAS = 4.0


@lru_cache(maxsize=256)
def graph_sizes(max_batch: int) -> tuple[int, ...]:
    """The batch sizes that an engine has CUDA graphs for: a limit between two of them pays for the larger one.

    1, 2, 4, then steps of 8, from 256 steps of 16 (vLLM 0.29), up to the start value, which is always one.
    """
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, max_batch + 1, 16))
    return (*(size for size in sizes if size < max_batch), max_batch)


def snap(batch: float, max_batch: int) -> int:
    """The largest graph size that is not above `batch`; 1 at least."""
    sizes = graph_sizes(max_batch)
    return sizes[max(bisect_right(sizes, batch) - 1, 0)]


def implied_batch(on: Surface, demand: float) -> IntArray:
    """(C,): the column of the batch that a demand, tokens/s, implies at each cap (Little's law).

    That is the smallest batch that serves it, or the largest there is where none does.
    """
    reaches = on.capacity_tokens_per_s >= demand
    return np.where(reaches.any(axis=1), reaches.argmax(axis=1), len(on.batch) - 1)


def pinned_column(on: Surface, batch_limit: int) -> int:
    """The column of the largest batch that a pinned limit allows."""
    return max(int(np.searchsorted(on.batch, batch_limit, side="right")) - 1, 0)


def served_share(on: Surface, wanted: float, score: FloatArray) -> FloatArray:
    """(C, B): the share of what is `wanted`, tokens/s, that each point serves, times its latency score."""
    served = np.minimum(on.capacity_tokens_per_s, wanted)
    share = served / wanted if wanted > 0 else np.ones_like(served)
    return share * score


def best_batch(on: Surface, demand: float, wanted: float, share: FloatArray, *, may_wait: bool = True) -> IntArray:
    """(C,): the column of the batch with the best share (C, B; see `served_share`) at each cap.

    That is the batch which the demand implies, or a smaller one where the latency limits make it worth more. It is
    never so small that requests wait which are wanted and could be served: they would miss more than an ITL. Of an
    overload, requests are kept waiting only if they `may_wait`, for those miss their TTFT. Rates are tokens/s.
    """
    implied = implied_batch(on, demand)
    enough = on.capacity_tokens_per_s >= min(wanted, demand)
    least = np.where(enough.any(axis=1), enough.argmax(axis=1), 0 if may_wait else implied)
    column = np.arange(len(on.batch))
    usable = (column <= implied[:, None]) & (column >= least[:, None])
    return np.asarray(np.where(usable, share, -1.0).argmax(axis=1))


def batch_limits(
    on: Surface, demand: float, wanted: float, target: Target, *, most_batch: float, most_loss: float
) -> IntArray:
    """(C,): the column of the batch limit at each cap; `demand` and what of it is `wanted` in tokens/s.

    The limit is the largest batch within the ITL limit, but not above `most_batch` (KV pressure), not where capacity
    has fallen by more than the share `most_loss` below that of a smaller batch, and not so low that what is wanted
    would wait. A TTFT limit does not lower it: a request that is kept out waits even longer.
    """
    share = served_share(on, wanted, latency_score(replace(target, ttft_p99_s=None), on))
    capacity = on.capacity_tokens_per_s
    fit = (capacity >= (1.0 - most_loss) * np.maximum.accumulate(capacity, axis=1)) & (on.batch <= max(most_batch, 1.0))
    column = _last(fit & (share >= np.where(fit, share, -1.0).max(axis=1, keepdims=True) - EPS))
    enough = capacity >= min(demand, wanted)
    need = on.batch[enough.argmax(axis=1)]
    room = np.searchsorted(on.batch, need + ROOM_SIGMAS * np.sqrt(need))
    # In an overload those who are kept out miss the TTFT, and a smaller batch makes the queue last even longer.
    overloaded = column if target.ttft_p99_s is None else _last(fit)
    return np.where(enough.any(axis=1), np.minimum(np.maximum(column, room), _last(fit)), overloaded)


def _last(chosen: NDArray[np.bool_]) -> IntArray:
    """The last chosen column of each row of (C, B)."""
    return np.asarray(chosen.shape[1] - 1 - chosen[:, ::-1].argmax(axis=1))


def paced_limit(state: ControllerState, seen: Situation, config: ControllerConfig, present: int, wanted: int) -> int:
    """The batch limit after its dwell time, which is shorter for a lower limit than for a higher one."""
    since_s = seen.now_s - state.batch_changed_s
    return wanted if since_s >= (config.raise_dwell_s if wanted < present else config.cut_dwell_s) else present


def limit_under_kv_pressure(state: ControllerState, seen: Situation, config: ControllerConfig) -> ControllerState:
    """Lower the batch limit while the KV cache is full, and raise it again once there is room.

    A full cache makes the engine preempt sequences and compute them twice.
    """
    telemetry = seen.telemetry
    if seen.now_s - state.kv_changed_s < config.kv_hold_s:
        return state
    limit = state.kv_limit
    if telemetry.kv_use >= config.kv_high and telemetry.running > 1:
        limit = snap((1.0 - config.kv_step) * telemetry.running, seen.max_batch)
    elif telemetry.kv_use <= config.kv_low and limit is not None:
        limit = next(size for size in graph_sizes(seen.max_batch) if size > limit or size == seen.max_batch)
        limit = None if limit == seen.max_batch else limit
    return state if limit == state.kv_limit else replace(state, kv_limit=limit, kv_changed_s=seen.now_s)
