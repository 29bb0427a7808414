"""How a replica's batch limit is chosen: from TPOT, KV cache and the engine's graph sizes."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Situation
from pals_ray.control.replica.prediction import Surface
from pals_ray.types import Slo

IntArray = NDArray[np.intp]

#: Shares nearer than this are the same.
EPS = 1e-9
#: The largest share of capacity that a larger batch may lose against a smaller one.
MOST_CAPACITY_LOSS = 0.03


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


def pinned_column(on: Surface, batch_limit: int) -> int:
    """The column of the largest batch that a pinned limit allows."""
    return max(int(np.searchsorted(on.batch, batch_limit, side="right")) - 1, 0)


def batch_limits(on: Surface, slo: Slo, most_batch: float) -> IntArray:
    """(C,): the column of the batch limit at each cap: as large as TPOT, ITL and memory allow (`most_batch`).

    tokens/J rise with the batch, and who is kept out misses the TTFT. So the limit is the largest batch at which those
    that run keep TPOT and ITL; and the largest there is where even one sequence alone does not keep them. It is not
    where capacity has fallen below that of a smaller batch.
    """
    capacity = on.capacity_tokens_per_s
    fit = capacity >= (1.0 - MOST_CAPACITY_LOSS) * np.maximum.accumulate(capacity, axis=1)
    fit &= on.batch <= max(most_batch, 1.0)
    kept = fit & (on.batch <= (slo.tpot_s or np.inf) * capacity) & (on.itl_p99_s <= (slo.itl_p99_s or np.inf))
    return np.where(kept.any(axis=1), _last(kept), _last(fit))


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
