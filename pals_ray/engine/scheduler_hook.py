"""What our scheduler adds to vLLM's: it obeys the ordered batch limit and reports. Free of vLLM, to be tested alone."""

from __future__ import annotations

import time

from pals_ray.engine.control_block import ControlBlock
from pals_ray.processes import identify


class SchedulerHook:
    """What `PowerAwareScheduler` does at each step beside vLLM's own scheduling, through the control block."""

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
        """How many sequences may run in this step: the ordered limit, from 1 to the start value.

        It is never below what runs already, which vLLM asserts. Before the first order it is the start value.
        """
        ordered = self._ordered.item(0) or self._max_batch
        limit = min(ordered, self._max_batch)
        self._in_force[0] = limit
        return max(limit, running, 1)

    def publish(self, running: int, waiting: int) -> None:
        """Write what runs and waits after the step, and the time."""
        self._running[0] = running
        self._waiting[0] = waiting
        self._heartbeat_ns[0] = time.monotonic_ns()
