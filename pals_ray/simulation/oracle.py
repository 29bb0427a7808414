"""The best fixed operating point for a steady demand, found on the true physics: what no controller can know."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pals_ray.control.replica.batch_choice import graph_sizes
from pals_ray.control.snapshot import Overhead
from pals_ray.models.physics.roofline import RooflineModel
from pals_ray.types import OperatingPoint

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


@dataclass(frozen=True, slots=True)
class Limits:
    """Latency limits as multiples of the reference point's own p99, as the simulator's limits are of `static`'s."""

    itl_p99: float
    ttft_p99: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fixed point that meets the limits, and the watts of one replica with its part of the node's overhead."""

    point: OperatingPoint
    node_w: float


def steady_state(model: RooflineModel, point: OperatingPoint, demand_tokens_per_s: float) -> Steady:
    """What a replica does at a fixed point: the batch is what the demand implies (Little's law), and swings about it.

    The requests in the engine are taken to swing as a Poisson number does; those above the batch limit wait until as
    many have finished.
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


def least_cap_w(
    model: RooflineModel, batch_limit: int, demand_tokens_per_s: float, reference: Steady, limits: Limits
) -> float | None:
    """The least cap in whole W that serves the demand within the limits at a batch limit; None where none does.

    A bisection: whatever a cap allows, a higher one allows too.
    """
    gpu = model.physics.gpu
    low, high = math.ceil(gpu.min_limit_w), math.floor(gpu.max_limit_w)

    def good(cap_w: int) -> bool:
        found = steady_state(model, OperatingPoint(float(cap_w), batch_limit), demand_tokens_per_s)
        return (
            found.stable
            and found.itl_p99_s <= limits.itl_p99 * reference.itl_p99_s
            and found.ttft_p99_s <= limits.ttft_p99 * reference.ttft_p99_s
        )

    if not good(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle + 1, high)
    return float(low)


def candidates(
    model: RooflineModel,
    max_batch: int,
    demand_tokens_per_s: float,
    limits: Limits,
    overhead: Overhead,
    node_gpus: int,
) -> list[Candidate]:
    """For each batch limit with a CUDA graph the least cap that meets the limits, the fewest watts first.

    The reference of the limits is the highest cap at the start batch under the same demand.
    """
    top = OperatingPoint(model.physics.gpu.max_limit_w, max_batch)
    reference = steady_state(model, top, demand_tokens_per_s)
    found = []
    for batch in graph_sizes(max_batch):
        cap_w = least_cap_w(model, batch, demand_tokens_per_s, reference, limits)
        if cap_w is None:
            continue
        point = OperatingPoint(cap_w, batch)
        gpu_w = steady_state(model, point, demand_tokens_per_s).power_w
        found.append(Candidate(point, overhead.charge_w(gpu_w, model.num_gpus, node_gpus)))
    return sorted(found, key=lambda c: (c.node_w, -c.point.batch_limit))
