"""What only the runtime's processes tell one another: how an agent is made and found, and what a profiler reads."""

from __future__ import annotations

from dataclasses import dataclass

from pals_ray.control.messages import ReplicaSpec
from pals_ray.control.telemetry import Reading
from pals_ray.gpus.driver_choice import HardwareSpec
from pals_ray.processes import ProcessId

NAMESPACE = "pals-ray"
MANAGER_NAME = "GlobalPowerManager"


def agent_name(replica_id: str) -> str:
    """The agent's name in Ray, one per replica."""
    return f"PowerAgent:{replica_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpec(ReplicaSpec):
    """What an agent is made from: by its replica, or by the manager where an agent has to be replaced."""

    node_key: str
    replica: ProcessId
    block_path: str
    hardware: HardwareSpec
    storage_path: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """A fresh reading of a replica for a profiler; `caps_w` are the limits in force on its GPUs, W."""

    reading: Reading
    caps_w: tuple[float, ...]
