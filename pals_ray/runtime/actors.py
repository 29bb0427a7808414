"""Finding our actors by name, and making them where they are missing.

Agent and manager make one another: each is given the function that does.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pals_ray.runtime.agent.power_agent import PowerAgent
from pals_ray.runtime.manager.power_manager import GlobalPowerManager
from pals_ray.runtime.messages import MANAGER_NAME, NAMESPACE, AgentSpec, agent_name

NICENESS = 0

#: Ray takes `worker_process_setup_hook` from a whole job only; for single actors its variable does the same. Left to
#: itself glibc would keep an arena of memory for every one of Ray's threads.
_LIGHT = {
    "env_vars": {
        WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "pals_ray.runtime.actors.prepare_process",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "OMP_NUM_THREADS": "1",
    }
}


def prepare_process() -> None:
    """What each process of our actors does first: stay light, and come before the engines.

    Without pyarrow, which Ray imports (46 MB) with the first argument, if it can be found, to pass Arrow data: we never
    do. And at niceness 0, where we may: Ray's workers, engines among them, have 15, and cores that they keep busy are
    no reason for a cut to be late.
    """
    sys.modules.setdefault("pyarrow", None)  # type: ignore[arg-type]
    for thread in Path("/proc/self/task").iterdir():
        with suppress(PermissionError, ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(thread.name), NICENESS)


async def ensure_manager(storage_path: str) -> Any:
    """The cluster's manager; a new one takes up what its predecessor wrote at `storage_path`."""
    return await asyncio.to_thread(_find_or_make_manager, storage_path)


def _find_or_make_manager(storage_path: str) -> Any:
    try:
        return ray.get_actor(MANAGER_NAME, namespace=NAMESPACE)
    except ValueError:
        options = ray.remote(GlobalPowerManager).options(
            name=MANAGER_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            # On the head node, where its file is: on another it would die with that, and start without its memory.
            resources={HEAD_NODE_RESOURCE_NAME: 0.001},
            max_concurrency=1000,
            enable_task_events=False,
            runtime_env=_LIGHT,
        )
        return options.remote(storage_path, ensure_agent)


async def ensure_agent(spec: AgentSpec) -> Any:
    """A replica's agent, on the replica's node. Returns when the engine may start; raises what refused it."""
    agent = await asyncio.to_thread(_find_or_make_agent, spec)
    await agent.start.remote()
    return agent


def _find_or_make_agent(spec: AgentSpec) -> Any:
    options = ray.remote(PowerAgent).options(
        name=agent_name(spec.replica_id),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        num_gpus=0,
        max_concurrency=16,
        enable_task_events=False,
        runtime_env=_LIGHT,
        scheduling_strategy=NodeAffinitySchedulingStrategy(spec.node_id, soft=False),
    )
    return options.remote(spec, ensure_manager)
