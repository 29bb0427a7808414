"""The live batch limit, as the scheduler sees it; free of vLLM, so that rule and cost can be tested alone."""

from __future__ import annotations

import time

from pals_ray.engine.control_block import ControlBlock
from pals_ray.processes import identify


class SchedulerHook:
    """What `PowerAwareScheduler` adds to a step; apart from it, so that its cost can be measured alone."""

    def __init__(self, block: ControlBlock, max_batch: int) -> None:
        self._max_batch = max_batch
        self._ordered = block.field("batch_limit")
        self._in_force = block.field("limit_in_force")
        self._running = block.field("scheduler_running")
        self._waiting = block.field("scheduler_waiting")
        self._heartbeat_ns = block.field("scheduler_heartbeat_ns")
        block.field("engine_pid")[0], block.field("engine_start_ticks")[0] = identify()
        block.field("max_batch")[0] = max_batch
        self.limit(0)
        self.publish(0, 0)

    def limit(self, running: int) -> int:
        """How many may run in this step: what was ordered, within 1..start value, never under what runs already
        (vLLM asserts that). Nothing ordered yet means the start value."""
        ordered = self._ordered.item(0) or self._max_batch
        limit = min(ordered, self._max_batch)
        self._in_force[0] = limit
        return max(limit, running, 1)

    def publish(self, running: int, waiting: int) -> None:
        """Say what the step left running and waiting, and when."""
        self._running[0] = running
        self._waiting[0] = waiting
        self._heartbeat_ns[0] = time.monotonic_ns()
