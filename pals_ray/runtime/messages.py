"""What replica, agent and manager tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pals_ray.control.messages import AgentReport, Hello, Reply
from pals_ray.control.replica.latency_feedback import TailFactors
from pals_ray.control.slo import Tally
from pals_ray.control.telemetry import Reading
from pals_ray.models.correction import Correction
from pals_ray.models.lookup import LoadedModel
from pals_ray.processes import ProcessId
from pals_ray.runtime.node.hardware import HardwareSpec
from pals_ray.types import Expected, GpuInfo, ReplicaTelemetry, Target

NAMESPACE = "pals-ray"
MANAGER_NAME = "GlobalPowerManager"


def agent_name(replica_id: str) -> str:
    """The agent's name in Ray, one per replica."""
    return f"PowerAgent:{replica_id}"


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """What an agent is made from: by its replica, or by the manager where an agent has to be replaced.

    `gpus` and `max_batch` are what the replica has claimed so far: nothing at first.
    """

    replica_id: str
    model: str
    num_gpus: int
    node_id: str
    node_key: str
    node_labels: tuple[tuple[str, str], ...]
    replica: ProcessId
    block_path: str
    hardware: HardwareSpec
    storage_path: str
    gpus: tuple[str, ...] = ()
    max_batch: int = 0


@dataclass(frozen=True, slots=True)
class NodeGpu:
    """One GPU of a node as an agent found it. W.

    `limit_w` is in force, `may_set`: we may set it (known once the node is enrolled), `holders`: pids with a context.
    """

    info: GpuInfo
    limit_w: float
    floor_w: float
    may_set: bool
    holders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Registration:
    """An agent's first word to a manager: who it is, its node's GPUs, and what is in force."""

    spec: AgentSpec
    hello: Hello
    managed: tuple[NodeGpu, ...]
    unmanaged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Beat:
    """An agent's word every beat: what is in force (for the ledger), what it sees and does (for policy and status).

    `power_w` holds the mean draw since the beat before of every managed GPU that this agent reads: its own, and the
    parked ones it keeps. `natural_draw_w` is the group's, measured or predicted. `expected` is what the point in force
    was chosen on, `correction` what telemetry says of the model, `tails` what of its latencies, `tally` what QoS is
    judged by (None before its engine runs).
    """

    report: AgentReport
    telemetry: ReplicaTelemetry
    power_w: Mapping[str, float]
    unmanaged_w: float
    cap_w: float | None
    batch_limit: int | None
    reason: str
    natural_draw_w: float | None
    errors: Mapping[str, str]
    demand_tokens_per_s: float | None = None
    expected: Expected | None = None
    correction: Correction = field(default_factory=Correction)
    tails: TailFactors = field(default_factory=TailFactors)
    tally: Tally | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """A fresh reading of a replica for a profiler; `caps_w` are the limits in force on its GPUs, W."""

    reading: Reading
    caps_w: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The manager's answer to whatever an agent says.

    `fail_safe_w` is the cap to go to when a lease ends, W; None for the device's lowest. `target` is the model's, with
    this replica's part of its tokens/s; `serving` is how many replicas the model has. `model` comes with the answer to
    a hello alone (None there: nothing predicts the replica).
    """

    reply: Reply
    fail_safe_w: float | None
    target: Target = field(default_factory=Target)
    serving: int = 1
    model: LoadedModel | None = None
