"""A vLLM stat logger that publishes the engine's counters, gauges and latencies in the control block."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.metrics.loggers import StatLoggerBase

from pals_ray.engine.control_block import BLOCK_VARIABLE, ControlBlock, RecordWriter, add_latencies

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, MultiModalCacheStats, SchedulerStats


class PowerStatLogger(StatLoggerBase):  # type: ignore[misc]
    """Loaded by vLLM as an entry point in every engine of the environment; idle where no control block is named."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        path = os.environ.get(BLOCK_VARIABLE)
        self._record = StatRecord(ControlBlock.attach(path)) if path else None

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Publish one engine step; called in the event loop, so it must take only a few microseconds."""
        if self._record is not None:
            self._record.write(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        """The first heartbeat: the engine is up and this logger was loaded."""
        self.record(None, None)


class StatRecord:
    """The stat logger's record in the control block."""

    def __init__(self, block: ControlBlock) -> None:
        self._writer = RecordWriter(block.field("logger_sequence"))
        self._heartbeat_ns = block.field("logger_heartbeat_ns")
        self._running, self._waiting = block.field("running"), block.field("waiting")
        self._kv_use = block.field("kv_use")
        self._prompt_tokens = block.field("prompt_tokens")
        self._generation_tokens = block.field("generation_tokens")
        self._requests_finished = block.field("requests_finished")
        self._preemptions = block.field("preemptions")
        self._ttft_counts = block.field("ttft_counts")
        self._tpot_counts = block.field("tpot_counts")
        self._itl_counts = block.field("itl_counts")

    def write(self, scheduler: SchedulerStats | None, iteration: IterationStats | None) -> None:
        """Take over the gauges of `scheduler` and add the counts of `iteration`."""
        with self._writer:
            self._heartbeat_ns[0] = time.monotonic_ns()
            if scheduler is not None:
                self._running[0] = scheduler.num_running_reqs
                self._waiting[0] = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
                self._kv_use[0] = scheduler.kv_cache_usage
            if iteration is not None:
                self._prompt_tokens[0] += iteration.num_prompt_tokens
                self._generation_tokens[0] += iteration.num_generation_tokens
                self._requests_finished[0] += len(iteration.finished_requests)
                self._preemptions[0] += iteration.num_preempted_reqs
                add_latencies(self._ttft_counts, iteration.time_to_first_tokens_iter)
                add_latencies(self._itl_counts, iteration.inter_token_latencies_iter)
                if iteration.finished_requests:
                    add_latencies(self._tpot_counts, _tpots_s(iteration.finished_requests))


def _tpots_s(finished: Iterable[FinishedRequestStats]) -> list[float]:
    """TPOT of each request that has one. Those that their clients aborted are not among the finished ones."""
    return [request.mean_time_per_output_token for request in finished if request.num_generation_tokens > 1]
