"""A worker that holds a virtual GPU but is not paced: the engine runs at the speed of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.cpu_worker import CPUWorker

from pals_ray.engine.virtual.paced_worker import PacedWorker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput


class UnpacedWorker(PacedWorker):
    """Holds its GPU as a paced worker does, and computes as vLLM's own: for `pals bench overhead`."""

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """As vLLM's."""
        return CPUWorker.execute_model(self, scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """As vLLM's."""
        return CPUWorker.sample_tokens(self, grammar_output)
