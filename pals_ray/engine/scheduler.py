"""A vLLM scheduler that obeys a live batch limit, ordered through the control block, and has its requests judged."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from pals_ray.engine.control_block import BLOCK_VARIABLE, BlockError, ControlBlock
from pals_ray.engine.request_watch import RequestWatch
from pals_ray.engine.scheduler_hook import SchedulerHook

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_PR_SET_PDEATHSIG = 1


class PowerAwareScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, admitting at most as many sequences as the control block says.

    A lower limit drains: nothing running is preempted, waiting requests are kept. The limit never exceeds the start
    value (`max_num_seqs`), which sizes buffers and CUDA graphs. Each request is judged by the limits in the block
    (`RequestWatch`). Raises `BlockError` where the environment names no block.
    """

    def __new__(cls, vllm_config: VllmConfig, **_: Any) -> PowerAwareScheduler:
        """Extend the scheduler that vLLM would choose for this engine: asynchronous or not."""
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
        self._pals_watch = RequestWatch(block)
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

    def add_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Take a request in, or more input of one that is a session."""
        known = request.request_id in self.requests
        super().add_request(request, *args, **kwargs)
        if not known:
            self._pals_watch.arrived(request)

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Take a step's tokens over: they are known here, also where steps are scheduled ahead of them."""
        self._pals_watch.tokens_came()
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)
        scheduled = [request.req_id for request in scheduler_output.scheduled_new_reqs]
        self._pals_watch.stepped(scheduled, self.finished_req_ids)
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, *args: Any, **kwargs: Any) -> Any:
        """End requests from outside: clients that have gone, errors, or (None) all of them, as the engine stops."""
        finished = super().finish_requests(request_ids, *args, **kwargs)
        self._pals_watch.ended(self.finished_req_ids, by_client=request_ids is not None)
        return finished


class _PowerAwareAsyncScheduler(PowerAwareScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same, for engines that schedule a step before the tokens of the last one are known."""


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
    if os.getppid() != parent.pid:  # The parent ended before the call to prctl.
        os.kill(os.getpid(), signal.SIGKILL)
