"""A vLLM scheduler that obeys a live batch limit, ordered through the control block."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from pals_ray.engine.control_block import BLOCK_VARIABLE, BlockError, ControlBlock
from pals_ray.engine.scheduler_hook import SchedulerHook

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

_PR_SET_PDEATHSIG = 1


class PowerAwareScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, admitting at most as many sequences as the control block says.

    A lower limit drains: nothing running is preempted, waiting requests are kept. The limit never exceeds the start
    value (`max_num_seqs`), which sizes buffers and CUDA graphs. Raises `BlockError` where the environment names no
    block.
    """

    def __new__(cls, vllm_config: VllmConfig, **_: Any) -> PowerAwareScheduler:
        """Over the scheduler that vLLM would take for this engine, by its own setting."""
        asynchronous = cls is PowerAwareScheduler and vllm_config.scheduler_config.async_scheduling
        made: PowerAwareScheduler = super().__new__(_PowerAwareAsyncScheduler if asynchronous else cls)
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        die_with_parent()
        path = os.environ.get(BLOCK_VARIABLE)
        if path is None:
            raise BlockError(
                f"PowerAwareScheduler needs {BLOCK_VARIABLE} to name a control block: the pals_ray LLM server sets it"
            )
        block = ControlBlock.attach(path)
        self._pals_hook = SchedulerHook(block, self.max_num_running_reqs)
        block.field("step_tokens")[0] = self.max_num_scheduled_tokens
        cache = self.kv_cache_config
        block.field("kv_tokens")[0] = cache.num_blocks // max(len(cache.kv_cache_groups), 1) * self.block_size
        # Newer vLLM limits admission apart from the runner's slots (vllm pull request 56758).
        self._pals_attribute = "max_num_active_reqs" if hasattr(self, "max_num_active_reqs") else "max_num_running_reqs"

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One scheduling step under the limit in force now."""
        setattr(self, self._pals_attribute, self._pals_hook.limit(len(self.running)))
        output = super().schedule(*args, **kwargs)
        self._pals_hook.publish(len(self.running), len(self.waiting) + len(self.skipped_waiting))
        return output


class _PowerAwareAsyncScheduler(PowerAwareScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same, for engines that schedule a step before the last one's tokens are known."""


def die_with_parent() -> None:
    """Have the kernel kill EngineCore when its parent goes, as `ray stop -f` leaves engines behind otherwise.

    Only in EngineCore's own process (workers leave with it); elsewhere, as in an engine without a process of its own,
    it would kill whoever built the scheduler.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith("EngineCore"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent.pid:  # It went before the call.
        os.kill(os.getpid(), signal.SIGKILL)
