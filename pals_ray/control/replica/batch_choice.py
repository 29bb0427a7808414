"""How a replica's batch limit is chosen: from demand, latency limits and KV cache, among the engine's graph sizes."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Situation
from pals_ray.control.replica.prediction import Surface
from pals_ray.models.power_model import FloatArray

IntArray = NDArray[np.intp]


@lru_cache(maxsize=256)
def graph_sizes(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4, then steps of 8, from 256 steps of 16 (vLLM 0.29), up to the start value, which is always one."""
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, max_batch + 1, 16))
    return (*(size for size in sizes if size < max_batch), max_batch)


def snap(batch: float, max_batch: int) -> int:
    """The largest of these sizes that is not above `batch`; 1 at least."""
    sizes = graph_sizes(max_batch)
    return sizes[max(bisect_right(sizes, batch) - 1, 0)]


def implied_batch(on: Surface, demand: float) -> IntArray:
    """(C,): the column of `on.batch` that a demand, tokens/s, implies at each cap, the least that serves it (Little's
    law); the last where none does."""
    reaches = on.capacity_tokens_per_s >= demand
    return np.where(reaches.any(axis=1), reaches.argmax(axis=1), len(on.batch) - 1)


def best_batch(
    on: Surface, demand: float, wanted: float, met: FloatArray, *, may_wait: bool = True
) -> tuple[FloatArray, IntArray, IntArray]:
    """What each point serves of what is `wanted`, and the batch that is best at each cap.

    Returns shares (C, B), times `met` (C, B; see `latency_score`), and columns of `on.batch` (C,): the batch that the
    demand implies (`implied_batch`), and that or a smaller one where the latency limits make it worth more, but none
    that would keep waiting what is wanted and could be served, nor, unless they `may_wait`, any of an overload: those
    kept out miss the TTFT. Rates are tokens/s.
    """
    served = np.minimum(on.capacity_tokens_per_s, wanted)
    share = served / wanted if wanted > 0 else np.ones_like(served)
    # Those whom a smaller batch keeps out wait, and miss more than the latency of those who are in: a miss is weighed.
    share = share * met
    implied = implied_batch(on, demand)
    # Whom a smaller batch than what is wanted makes run keeps out waits, and misses more than an inter-token latency.
    enough = on.capacity_tokens_per_s >= min(wanted, demand)
    least = np.where(enough.any(axis=1), enough.argmax(axis=1), 0 if may_wait else implied)
    column = np.arange(len(on.batch))
    usable = (column <= implied[:, None]) & (column >= least[:, None])
    chosen = np.where(usable, share, -1.0).argmax(axis=1)
    return share, implied, chosen


def paced_limit(state: ControllerState, seen: Situation, config: ControllerConfig, present: int, wanted: int) -> int:
    """The batch limit after dwell: lower sooner than higher."""
    since_s = seen.now_s - state.batch_changed_s
    return wanted if since_s >= (config.raise_dwell_s if wanted < present else config.cut_dwell_s) else present


def limit_under_kv_pressure(state: ControllerState, seen: Situation, config: ControllerConfig) -> ControllerState:
    """A full KV cache makes the engine preempt, and compute twice: fewer at once; more again once it has room."""
    telemetry = seen.telemetry
    if seen.now_s - state.kv_changed_s < config.kv_hold_s:
        return state
    limit = state.kv_limit
    if telemetry.kv_use >= config.kv_high and telemetry.running > 1:
        limit = snap((1.0 - config.kv_step) * telemetry.running, seen.max_batch)
    elif telemetry.kv_use <= config.kv_low and limit is not None:
        limit = next((size for size in graph_sizes(seen.max_batch) if size > limit), None)
        limit = None if limit is None or limit >= seen.max_batch else limit
    return state if limit == state.kv_limit else replace(state, kv_limit=limit, kv_changed_s=seen.now_s)
