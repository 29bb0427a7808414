"""What our hooks cost a step of the engine, measured on this machine without one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pals_ray.engine.control_block import ControlBlock
from pals_ray.engine.scheduler_hook import SchedulerHook


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds a call: the median and the 99th percentile."""

    p50_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class HookCosts:
    """`scheduler` is added to each step in EngineCore, `stat_logger` to each step in the replica's event loop;
    `agent_read` is what one reading of the block costs the agent."""

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
        hook, record = SchedulerHook(block, batch), StatRecord(block)
        scheduler, iteration = SchedulerStats(num_running_reqs=batch), IterationStats()
        iteration.num_generation_tokens = batch
        iteration.inter_token_latencies_iter = [0.025 + 1e-6 * i for i in range(batch)]

        def step() -> None:
            hook.limit(batch)
            hook.publish(batch, 0)

        return HookCosts(
            batch,
            _time(step, calls),
            _time(lambda: record.write(scheduler, iteration), calls),
            _time(lambda: block.telemetry(), calls // 10),
        )


def _time(call: Callable[[], object], calls: int) -> Cost:
    took_us = np.empty(calls)
    for i in range(calls):
        start_ns = time.perf_counter_ns()
        call()
        took_us[i] = (time.perf_counter_ns() - start_ns) / 1000
    return Cost(*np.percentile(took_us, [50, 99]).tolist())
