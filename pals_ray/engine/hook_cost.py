"""What our scheduler's hook adds to a step of the engine, measured on this machine without an engine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np

from pals_ray.engine.control_block import ControlBlock
from pals_ray.engine.request_watch import RequestWatch
from pals_ray.engine.scheduler_hook import SchedulerHook


class _Status(Enum):
    FINISHED_STOPPED = 1


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds a call: the median and the 99th percentile."""

    p50_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class HookCosts:
    """`scheduler` is added to a step in EngineCore in which one request comes, one gets its first token and one ends;
    `stat_logger` to each step in the replica's event loop; `agent_read` is what a reading of the block costs the agent.
    """

    batch: int
    scheduler: Cost
    stat_logger: Cost
    agent_read: Cost


def measure_hooks(batch: int = 64, calls: int = 20_000) -> HookCosts:
    """Time each hook `calls` times, for steps in which `batch` sequences get a token. Imports vLLM."""
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

    from pals_ray.engine.stat_logger import StatRecord

    with tempfile.TemporaryDirectory() as folder:
        block = ControlBlock.create(Path(folder) / "block")
        hook, watch, record = SchedulerHook(block, batch), RequestWatch(block), StatRecord(block)
        block.order_latency_limits(2.0, 0.1)
        requests = [_Request(str(i)) for i in range(calls + batch)]
        for request in requests[:batch]:
            request.num_output_tokens = 1
            watch.arrived(request)
        names = iter(range(calls))
        scheduler, iteration = SchedulerStats(num_running_reqs=batch), IterationStats()
        iteration.num_generation_tokens = batch
        iteration.inter_token_latencies_iter = [0.025 + 1e-6 * i for i in range(batch)]

        def step() -> None:
            ends = next(names)
            comes = requests[ends + batch]
            watch.arrived(comes)
            hook.limit(batch)
            hook.publish(batch, 0)
            watch.tokens_came()
            comes.num_output_tokens = 1
            watch.stepped((comes.request_id,), {requests[ends].request_id})

        logger_cost = _time(lambda: record.write(scheduler, iteration), calls)
        read_cost = _time(lambda: block.telemetry(), calls // 10)
        return HookCosts(batch, _time(step, calls), logger_cost, read_cost)


@dataclass(slots=True)
class _Request:
    """What the hook asks of vLLM's request, of one that has ended as it should."""

    request_id: str
    num_output_tokens: int = 0
    arrival_time: float = field(default_factory=time.time)
    status: Enum = _Status.FINISHED_STOPPED
    resumable: bool = False
    sampling_params: object = None


def _time(call: Callable[[], object], calls: int) -> Cost:
    took_us = np.empty(calls)
    for i in range(calls):
        start_ns = time.perf_counter_ns()
        call()
        took_us[i] = (time.perf_counter_ns() - start_ns) / 1000
    return Cost(*np.percentile(took_us, [50, 99]).tolist())
