"""The best fixed operating point for a steady demand, found on the true physics: what no controller can know."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from pals_ray.control.replica.batch_choice import graph_sizes
from pals_ray.control.snapshot import Overhead
from pals_ray.models.physics.roofline import RooflineModel
from pals_ray.types import OperatingPoint, Target

#: The 99th percentile of a normal deviate: how far the requests in an engine rise above their mean.
_P99 = 2.33
_BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class Steady:
    """One replica at a point, under a steady demand: mean requests running, draw of its GPUs, W, and p99 latencies, s.

    `stable` is False where the demand is more than the point serves; the rest is then that of a full batch.
    """

    running: float
    power_w: float
    itl_p99_s: float
    ttft_p99_s: float
    stable: bool


def steady_state(model: RooflineModel, point: OperatingPoint, demand_tokens_per_s: float) -> Steady:
    """A replica at a fixed point: its mean batch is what the demand implies (Little's law).

    The number of requests in the engine is taken as Poisson; those above the batch limit wait until as many have
    finished.
    """
    limit = float(point.batch_limit)

    def serves(batch: float) -> float:
        return float(model.predict(point.cap_w, batch).throughput_tokens_per_s)

    stable = serves(limit) > demand_tokens_per_s
    # Under what one sequence at a time makes, the engine idles for the rest.
    busy = min(demand_tokens_per_s / serves(1.0), 1.0)
    low, high = 1.0, limit
    if busy < 1.0:
        high = 1.0
    elif stable:
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if serves(middle) < demand_tokens_per_s else (low, middle)
    running = busy * high
    crowd = running + _P99 * math.sqrt(running)
    crowded = model.predict(point.cap_w, min(max(crowd, 1.0), limit))
    wait_s = max(crowd - limit, 0.0) * model.workload.output_tokens / demand_tokens_per_s
    idle_w = model.physics.gpu.idle_context_w * model.num_gpus
    return Steady(
        running=running,
        power_w=idle_w + busy * (float(model.predict(point.cap_w, high).power_w) - idle_w),
        itl_p99_s=float(crowded.itl_p99_s),
        ttft_p99_s=float(crowded.ttft_p99_s) + wait_s,
        stable=stable,
    )


def least_cap_w(model: RooflineModel, batch_limit: int, demand_tokens_per_s: float, target: Target) -> float | None:
    """The least cap in whole W that serves the demand within latency limits at a batch limit; None where none does.

    A bisection: whatever a cap allows, a higher one allows too.
    """
    gpu = model.physics.gpu
    caps_w = range(math.ceil(gpu.min_limit_w), math.floor(gpu.max_limit_w) + 1)

    def good(cap_w: int) -> bool:
        found = steady_state(model, OperatingPoint(float(cap_w), batch_limit), demand_tokens_per_s)
        pairs = ((found.itl_p99_s, target.itl_p99_s), (found.ttft_p99_s, target.ttft_p99_s))
        return found.stable and all(limit_s is None or found_s <= limit_s for found_s, limit_s in pairs)

    return float(caps_w[bisect_left(caps_w[:-1], True, key=good)]) if good(caps_w[-1]) else None


def candidates(
    model: RooflineModel, max_batch: int, demand_tokens_per_s: float, target: Target, overhead: Overhead, node_gpus: int
) -> list[tuple[float, OperatingPoint]]:
    """For each batch limit with a CUDA graph the least cap within the latency limits, the fewest watts first.

    The watts are those of one replica with its part of the node's overhead.
    """
    found = []
    for batch in graph_sizes(max_batch):
        cap_w = least_cap_w(model, batch, demand_tokens_per_s, target)
        if cap_w is not None:
            point = OperatingPoint(cap_w, batch)
            gpu_w = steady_state(model, point, demand_tokens_per_s).power_w
            found.append((overhead.charge_w(gpu_w, model.num_gpus, node_gpus), point))
    return sorted(found, key=lambda one: (one[0], -one[1].batch_limit))
