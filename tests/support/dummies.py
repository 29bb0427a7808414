"""Fleets without engines: real manager, agents and guardian on a real Ray cluster, beside processes that only sleep."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from pals_ray.engine.control_block import BlockError, ControlBlock, block_path
from pals_ray.gpus.driver_choice import HardwareSpec
from pals_ray.gpus.virtual import VirtualDriver, VirtualGpu
from pals_ray.gpus.virtual_block import remove_block
from pals_ray.processes import ProcessId, identify, is_alive
from pals_ray.runtime.actors import ensure_agent, ensure_manager
from pals_ray.runtime.client import Fleet
from pals_ray.runtime.messages import MANAGER_NAME, NAMESPACE, AgentSpec, agent_name
from pals_ray.runtime.node.enrolment import order_stop
from pals_ray.runtime.node.node_file import read_state, state_path
from pals_ray.types import FleetStatus, ReplicaStatus
from tests.support.fleets import SHARED_MEMORY, actor_processes, wait_for

MODEL = "dummy"
MAX_BATCH = 32
VIRTUAL = HardwareSpec("virtual", "A100-SXM", 4)

_versions = itertools.count(time.time_ns())
_names = itertools.count()


def content(budget_w: float, storage: Path, **more: Any) -> dict[str, Any]:
    """A fleet file of one model that nothing predicts, so that its caps are its grants; `more` are further keys."""
    model = {"llm_config": {"model_loading_config": {"model_id": MODEL}}}
    return {
        "budget_w": budget_w,
        "storage_path": str(storage),
        "policy": "policies.uniform:allocate",
        "models": [model],
        "hardware": {"kind": "auto"},
        **more,
    }


class Replica:
    """A process that sleeps, with a control block that is its own, and an agent beside it."""

    def __init__(self, name: str, num_gpus: int, node_id: str, key: str, hardware: HardwareSpec, **spec: Any) -> None:
        self.process = subprocess.Popen(["sleep", "600"])
        self.block = ControlBlock.create(block_path(key, name))
        owner = identify(self.process.pid)
        self.block.field("owner_pid")[0], self.block.field("owner_start_ticks")[0] = owner
        self.spec = AgentSpec(
            replica_id=f"{MODEL}#{name}",
            model=MODEL,
            num_gpus=num_gpus,
            node_id=node_id,
            node_key=key,
            replica=owner,
            block_path=str(self.block.path),
            hardware=hardware,
            **spec,
        )
        self.id = self.spec.replica_id
        self.gpus: tuple[str, ...] = ()

    @property
    def agent(self) -> Any:
        return ray.get_actor(agent_name(self.id), namespace=NAMESPACE)

    @property
    def agent_process(self) -> ProcessId | None:
        """The agent's process, None where it has none."""
        with suppress(ValueError, ray.exceptions.RayError):
            return identify(ray.get(self.agent.__ray_call__.remote(_pid), timeout=10))
        return None

    def claim(self, uuids: Sequence[str], max_batch: int = MAX_BATCH) -> None:
        """What a server says once its ranks have reported their GPUs."""
        ray.get(self.agent.claim.remote(list(uuids), max_batch), timeout=20)
        self.gpus = tuple(uuids)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def _pid(_: Any) -> int:
    import os

    return os.getpid()


class DummyFleet:
    """One manager with a file of its own, and dummy replicas on nodes that each have their own GPUs and guardian."""

    def __init__(self, storage: Path, hardware: HardwareSpec = VIRTUAL) -> None:
        self.storage = storage
        self.hardware = hardware
        self.key = f"test-{uuid.uuid4().hex[:8]}"
        self.keys = {self.key}
        self.node_id: str = ray.get_runtime_context().get_node_id()
        self.replicas: list[Replica] = []

    # -- what Serve does

    def configure(self, budget_w: float, **more: Any) -> None:
        """Deploy a fleet file."""
        given = content(budget_w, self.storage, **more)
        ray.get(self.manager.configure.remote(given, f"{next(_versions):020d}", ""), timeout=30)

    def replica(self, num_gpus: int = 1, *, node_id: str = "", key: str = "", labels: dict[str, str] | None = None):
        """A new replica whose process runs, without an agent yet."""
        key = key or self.key
        self.keys.add(key)
        made = Replica(
            f"r{next(_names)}",
            num_gpus,
            node_id or self.node_id,
            key,
            self.hardware,
            node_labels=tuple((labels or {}).items()),
            storage_path=str(self.storage),
        )
        self.replicas.append(made)
        return made

    def register(self, *replicas: Replica) -> None:
        """Their agents, all at once; returns when their engines may start."""

        async def all_of_them() -> None:
            await asyncio.gather(*(ensure_agent(replica.spec) for replica in replicas))

        asyncio.run(asyncio.wait_for(all_of_them(), 60))

    def serve(self, *sizes: int) -> list[Replica]:
        """A replica for each of these GPU counts, registered, with GPUs claimed, and raised by the policy.

        Those that serve already are kept.
        """
        self.replicas = [replica for replica in self.replicas if replica.process.poll() is None]
        rest, made, found = list(self.replicas), [], []
        for size in sizes:
            known = next((replica for replica in rest if replica.gpus and replica.spec.num_gpus == size), None)
            if known is None:
                made.append(known := self.replica(size))
            else:
                rest.remove(known)
            found.append(known)
        for replica in rest:
            replica.kill()
        self.replicas = found
        self.register(*made)
        held = {uuid for replica in found for uuid in replica.gpus}
        free = iter([gpu.uuid for gpu in self.gpus if gpu.uuid not in held])
        for replica in made:
            replica.claim([next(free) for _ in range(replica.spec.num_gpus)])
        wait_for(self.settled, 20, "the replicas are not raised", 0.05)
        return found

    # -- looking on

    @property
    def manager(self) -> Any:
        return asyncio.run(ensure_manager(str(self.storage)))

    @property
    def fleet(self) -> Fleet:
        _ = self.manager  # made where there is none
        return Fleet()

    @property
    def gpus(self) -> Sequence[VirtualGpu]:
        return self.gpus_of(self.key)

    def gpus_of(self, key: str) -> Sequence[VirtualGpu]:
        """The virtual GPUs of a node, looked at from outside."""
        return VirtualDriver.attach(key).gpus()

    def limits_w(self, uuids: Sequence[str] | None = None) -> list[float]:
        """Limits in force of these GPUs, of all by default."""
        return [gpu.limit_w() for gpu in self.gpus if uuids is None or gpu.uuid in uuids]

    def status(self) -> FleetStatus:
        return self.fleet.status()

    def of(self, replica: Replica) -> ReplicaStatus | None:
        """What status says of a replica, None where it does not name it."""
        return next((row for row in self.status().replicas if row.replica_id == replica.id), None)

    def settled(self) -> bool:
        """Whether all replicas serve, each with its grant in force on all its GPUs and none at its lowest for long."""
        with suppress(ray.exceptions.RayError):
            status = self.status()
            rows = status.replicas
            limits_w = {gpu.uuid: gpu.limit_w for gpu in status.gpus}
            return (
                len(rows) == len([r for r in self.replicas if r.process.poll() is None])
                and all(row.state == "serving" for row in rows)
                and all(abs(sum(limits_w[u] for u in row.gpus) - row.grant_w) < 1 for row in rows)
                and status.reserved_w > 0.95 * min(status.budget_w, sum(gpu.info.max_limit_w for gpu in self.gpus))
            )
        return False

    def guardian(self) -> ProcessId | None:
        """The node's guardian, None where none lives."""
        state = read_state(self.key)
        return state.guardian if state and state.guardian and is_alive(state.guardian) else None

    def files(self) -> list[str]:
        """Files of this fleet's nodes under /dev/shm, but for the virtual GPUs."""
        names = (p.name for p in SHARED_MEMORY.glob("pals-*") if not p.name.startswith("pals-virtual-gpus-"))
        return sorted(name for name in names if any(key in name for key in self.keys))

    # -- the end

    def close(self) -> None:
        """Kill what is left, let the guardians clean up, and see that they did."""
        for replica in self.replicas:
            with suppress(ValueError):
                ray.kill(replica.agent)
            replica.kill()
        with suppress(ValueError):
            ray.kill(ray.get_actor(MANAGER_NAME, namespace=NAMESPACE))
        wait_for(lambda: not actor_processes("PowerAgent"), 10, "agents stay", 0.05)
        wait_for(lambda: not actor_processes("GlobalPowerManager"), 10, "the manager stays", 0.05)
        for key in self.keys:
            if state_path(key).exists():
                order_stop(key)
        wait_for(lambda: not self.files(), 20, "files of ours stay under /dev/shm", 0.05)
        for replica in self.replicas:
            with suppress(BlockError):
                replica.block.unlink()
        for key in self.keys:
            remove_block(key)
