"""How a replica's batch limit is chosen: from TPOT, KV cache and the engine's graph sizes."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pals_ray.control.replica.attainment import Attained, QueueingModel, chosen
from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Situation
from pals_ray.control.snapshot import Arrivals
from pals_ray.models.power_model import FloatArray

IntArray = NDArray[np.intp]

#: Shares nearer than this are the same.
EPS = 1e-9
#: The largest share of capacity that a larger batch may lose against a smaller one.
MOST_CAPACITY_LOSS = 0.03
#: A smaller batch limit has to raise the attainment by this.
LEAST_BETTER = 1e-3


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


def pinned_column(batch: FloatArray, batch_limit: int) -> int:
    """The column of the largest batch that a pinned limit allows."""
    return max(int(np.searchsorted(batch, batch_limit, side="right")) - 1, 0)


def batch_axis(max_batch: int) -> FloatArray:
    """The batch limits to choose from: graph sizes an eighth apart or more, and the largest."""
    sizes: list[int] = []
    for size in graph_sizes(max_batch):
        if not sizes or size >= 1.125 * sizes[-1]:
            sizes.append(size)
    return np.array([*(size for size in sizes if size < max_batch), max_batch], dtype=np.float64)


def with_batch_limits(queue: QueueingModel, arrivals: Arrivals, most_batch: float) -> tuple[IntArray, Attained]:
    """The column of the batch limit at each cap (C,), and what becomes of the arrivals with it.

    The limit is as large as memory allows (`most_batch`), for tokens/J rise with the batch, and who is kept out misses
    the TTFT; or, where even the highest cap cannot keep all of them good, as large as TPOT and ITL allow if that leaves
    more of them good: too many at once would all be late. It is not where capacity has fallen below that of a
    smaller batch.
    """
    on, slo = queue.on, queue.slo
    capacity = on.capacity_tokens_per_s
    fit = capacity >= (1.0 - MOST_CAPACITY_LOSS) * np.maximum.accumulate(capacity, axis=1)
    fit &= on.batch <= max(most_batch, 1.0)
    if slo.itl_p99_s is not None:
        kept = fit & (on.itl_p99_s <= slo.itl_p99_s)
        fit = np.where(kept.any(axis=1, keepdims=True), kept, fit)
    most = _last(fit)
    found = queue.attained(most, arrivals)
    if slo.tpot_s is None or found.attainment[-1] >= slo.attainment:
        return most, found
    kept = fit & (queue.tpot_s <= slo.tpot_s)
    fewer = np.where(kept.any(axis=1), _last(kept), most)
    limited = queue.attained(fewer, arrivals)
    if slo.ttft_s is None:
        better = limited.good_share > found.good_share + LEAST_BETTER
    else:
        # Where requests wait beyond their TTFT limit whatever the batch, a smaller one would only serve fewer tokens.
        better = limited.attainment > found.attainment + LEAST_BETTER
    return np.where(better, fewer, most), chosen(better, limited, found)


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
