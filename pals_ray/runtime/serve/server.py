"""The LLM server replica: Ray Serve LLM's own, with a power agent beside it and our hooks in its engine."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.llm._internal.serve.core.server.llm_server import LLMServer
from ray.serve.llm import LLMConfig
from ray.serve.llm.openai_api_models import CompletionRequest

from pals_ray.engine.control_block import BLOCK_VARIABLE, ControlBlock, block_path
from pals_ray.engine.hook_checks import engine_hooks_missing
from pals_ray.engine.virtual.pacing import PACING_VARIABLE, PacingConfig
from pals_ray.engine.virtual.tiny_models import CONFIGS, make_tiny_model
from pals_ray.errors import PalsError
from pals_ray.gpus.driver_choice import HardwareSpec
from pals_ray.processes import identify
from pals_ray.runtime.actors import ensure_agent
from pals_ray.runtime.messages import AgentSpec
from pals_ray.runtime.node.node_file import node_key
from pals_ray.runtime.serve.router import PARKED

HOOKS_DEADLINE_S = 60.0

#: Model sources that stand for the models that the project makes itself, and where every node makes them.
TINY_MODELS = {f"pals-ray/{name}": name for name in CONFIGS}
TINY_FOLDER = Path(tempfile.gettempdir()) / f"pals-ray-models-{os.getuid()}"

#: What lets engines of tiny models share a few CPU cores; an operator's own environment wins.
_CPU_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}


class EngineHookError(PalsError):
    """The engine runs, but without our hooks: it would obey no batch limit or report nothing."""


@dataclass(frozen=True)
class PowerOptions:
    """What a replica has to know of the fleet file to start; what only the manager needs is left out, so that changing
    targets or the budget restarts no engine."""

    num_gpus: int
    hardware: HardwareSpec
    storage_path: str
    stands_for: str | None
    time_scale: float
    tiny_model: str | None


class PowerLLMServer(LLMServer):  # type: ignore[misc]
    """One replica: registered at its lowest caps before its engine starts, and raised once its GPUs are claimed."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it, as it does Serve LLM's own
        self, llm_config: LLMConfig, *, power: PowerOptions, **kwargs: Any
    ) -> None:
        replica_id = serve.get_replica_context().replica_id.unique_id
        key = node_key(ray.util.get_node_ip_address())
        path = block_path(key, replica_id)
        self._power_block = block = ControlBlock.create(path)
        try:
            spec = _agent_spec(llm_config, power, replica_id, key, path)
            await ensure_agent(spec)
            _prepare_engine(llm_config, power, key, path)
            await super().__init__(llm_config, **kwargs)
            await self._check_hooks(block)
            uuids = await self.collective_rpc("pals_gpu_uuid")
            agent = await ensure_agent(spec)  # while the engine started, another agent may have replaced the first
            await agent.claim.remote(uuids, block.scheduler().max_batch)
        except BaseException:
            block.unlink()
            raise

    async def record_routing_stats(self) -> dict[str, Any]:
        """What Serve tells the request routers about this replica; see `pals_ray.runtime.serve.router`."""
        said: dict[str, Any] = await super().record_routing_stats()
        return {**said, PARKED: self._power_block.is_parked()}

    async def _check_hooks(self, block: ControlBlock) -> None:
        """Warm the engine up with one request, and check that scheduler and stat logger write to the block."""
        request = CompletionRequest(model=self._llm_config.model_id, prompt="warm", max_tokens=4)
        async for _ in await self.completions(request):
            pass
        until_s = time.monotonic() + HOOKS_DEADLINE_S
        while (missing := engine_hooks_missing(block)) is not None:
            if time.monotonic() > until_s:
                raise EngineHookError(missing)
            await asyncio.sleep(0.1)


def _agent_spec(llm_config: LLMConfig, power: PowerOptions, replica_id: str, key: str, path: Path) -> AgentSpec:
    context = ray.get_runtime_context()
    return AgentSpec(
        replica_id=f"{llm_config.model_id}#{replica_id}",
        model=llm_config.model_id,
        num_gpus=power.num_gpus,
        node_id=context.get_node_id(),
        node_key=key,
        node_labels=tuple(sorted((name, str(value)) for name, value in context.get_node_labels().items())),
        replica=identify(),
        block_path=str(path),
        hardware=power.hardware,
        storage_path=power.storage_path,
    )


def engine_hooks(hardware: HardwareSpec) -> dict[str, str]:
    """The engine arguments that install our hooks, the same for all replicas."""
    hooks = {
        "scheduler_cls": "pals_ray.engine.scheduler.PowerAwareScheduler",
        "worker_extension_cls": "pals_ray.engine.worker_extension.PowerWorkerExtension",
    }
    return hooks | (
        {"worker_cls": "pals_ray.engine.virtual.paced_worker.PacedWorker"} if hardware.kind == "virtual" else {}
    )


def _prepare_engine(llm_config: LLMConfig, power: PowerOptions, key: str, path: Path) -> None:
    """Set the environment, which the engine's processes inherit, to what differs between replicas."""
    os.environ[BLOCK_VARIABLE] = str(path)
    if power.hardware.kind == "virtual":
        assert power.stands_for is not None, "checked with the fleet file"
        pacing = PacingConfig(node_key=key, stands_for=power.stands_for, time_scale=power.time_scale)
        os.environ[PACING_VARIABLE] = pacing.model_dump_json()
        for name, value in _CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    if power.tiny_model is not None:
        make_tiny_model(power.tiny_model, TINY_FOLDER)
        # Serve LLM's download task would find nothing to do, in one more process with all of vLLM in it.
        llm_config.get_or_create_callback().ctx.run_init_node = False
