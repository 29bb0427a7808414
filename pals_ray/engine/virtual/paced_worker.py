"""A vLLM worker on a virtual GPU: it computes a tiny model on the CPU, at the pace and energy of a modelled GPU."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed
from vllm.distributed.parallel_state import get_world_group
from vllm.v1.worker.cpu_worker import CPUWorker

from pals_ray.engine.control_block import BLOCK_VARIABLE, ControlBlock
from pals_ray.engine.virtual.pacing import PaceCounters, Pacer, PacingConfig, PacingError, step_work
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.models.physics.step_cost import GroupPhysics
from pals_ray.models.specs import Parallelism, find_model

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput


class PacedWorker(CPUWorker):  # type: ignore[misc]
    """One rank. It claims the node's lowest free virtual GPU until its process ends.

    vLLM computes a step in `execute_model` and, where that returned nothing, `sample_tokens`: the step begins with the
    first and ends with the one that returned the result. Raises `PacingError` for a layout that the physics lacks.
    """

    virtual_gpu_uuid: str
    _pacer: Pacer

    def init_device(self) -> None:
        """Set the rank up as vLLM does, then claim a GPU and learn the group's."""
        super().init_device()
        config = PacingConfig.from_environment()
        parallel = self.parallel_config
        if parallel.world_size != parallel.tensor_parallel_size:
            raise PacingError(
                f"a replica of {parallel.world_size} ranks with tensor parallel {parallel.tensor_parallel_size} is not "
                "modelled: on virtual GPUs use tensor (and expert) parallel alone"
            )
        driver = VirtualDriver.attach(config.node_key)
        mine = driver.claim_lowest_free()
        self.virtual_gpu_uuid = mine.uuid
        uuids: list[Any] = [None] * parallel.world_size
        torch.distributed.all_gather_object(uuids, mine.uuid, group=get_world_group().cpu_group)
        self._unlink_all_reduce_memory()
        expert = parallel.tensor_parallel_size if parallel.enable_expert_parallel else 1
        physics = GroupPhysics(
            driver.spec, find_model(config.stands_for), Parallelism(parallel.tensor_parallel_size, expert)
        )
        block = os.environ.get(BLOCK_VARIABLE) if self.rank == 0 else None
        self._pacer = Pacer(
            physics,
            [driver.gpu(uuid) for uuid in uuids],
            self.rank,
            config.time_scale,
            PaceCounters(ControlBlock.attach(block)) if block else None,
        )

    def _unlink_all_reduce_memory(self) -> None:
        """Remove the file of vLLM's CPU all-reduce (4 MiB a rank). All ranks have it mapped, and vLLM leaves it."""
        engine = os.environ["VLLM_DIST_IDENT"]
        for path in Path("/dev/shm").glob(f"{glob.escape(engine)}-*-cpushm_{self.rank}"):
            path.unlink()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """As vLLM's; ends the step if it gave the result already."""
        if scheduler_output.total_num_scheduled_tokens == 0:
            return super().execute_model(scheduler_output)
        self._pacer.begin(step_work(scheduler_output))
        output = super().execute_model(scheduler_output)
        if output is not None:
            self._pacer.end()
        return output

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """As vLLM's; ends the step."""
        output = super().sample_tokens(grammar_output)
        self._pacer.end()
        return output
