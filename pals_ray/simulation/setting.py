"""What is to be simulated: nodes, models, budget, policy, message delays and failures. Pure values, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from pals_ray.control.budget.moving_budget import BudgetPlan
from pals_ray.control.ledger.feasible_charges import LedgerConfig
from pals_ray.control.manager.deployment import DeployedModel, Deployment
from pals_ray.control.replica.controller_state import ControllerConfig
from pals_ray.control.snapshot import Domain, Overhead, Policy
from pals_ray.errors import PalsError
from pals_ray.models.physics.roofline import Workload
from pals_ray.models.physics.step_cost import GroupPhysics
from pals_ray.models.power_model import PowerModel
from pals_ray.models.specs import Parallelism, find_gpu, find_model
from pals_ray.simulation.traces import Trace
from pals_ray.types import OperatingPoint, Target

#: vLLM's `gpu_memory_utilization` (0.9), less what activations and CUDA graphs take of it.
_USABLE_MEMORY = 0.85


class SimulationError(PalsError):
    """A setting that no fleet could be run with."""


@dataclass(frozen=True)
class SimModel:
    """A served model: which one on which GPUs, how its engines start, and what is wanted of it.

    `max_batch` is vLLM's `max_num_seqs`, `step_tokens` its `max_num_batched_tokens`, `kv_tokens` how many tokens the
    KV cache of one replica holds (None: what weights leave of the GPUs' memory). `workload` is what the controllers'
    model of it assumes of requests, `belief` that model itself (None: the roofline, which is the true physics but for
    queueing and dies). With `fixed` its replicas
    stay at that point from first to last, and neither agent nor manager touches them.
    """

    name: str
    spec: str
    gpu: str
    parallelism: Parallelism = field(default_factory=Parallelism)
    max_batch: int = 64
    step_tokens: int = 8192
    kv_tokens: int | None = None
    workload: Workload = field(default_factory=Workload)
    target: Target = field(default_factory=Target)
    belief: PowerModel | None = None
    fixed: OperatingPoint | None = None

    @cached_property
    def physics(self) -> GroupPhysics:
        """The silicon that its replicas run on. Raises `UnknownSpecError`."""
        return GroupPhysics(find_gpu(self.gpu), find_model(self.spec), self.parallelism)

    @cached_property
    def kv_capacity_tokens(self) -> int:
        """Tokens that one replica's KV cache holds. Raises `SimulationError` where the weights leave no room."""
        if self.kv_tokens is not None:
            return self.kv_tokens
        gpu, model, ranks = find_gpu(self.gpu), find_model(self.spec), self.parallelism.num_gpus
        usable_bytes = _USABLE_MEMORY * gpu.memory_bytes - model.total_params * model.weight_bytes / ranks
        # As in the physics: more ranks than KV heads replicate them, and a latent cache is whole on every rank.
        kv_ranks = 1 if model.latent_kv_values else min(ranks, model.kv_heads)
        tokens = int(usable_bytes / (model.kv_values_per_token * 2.0 / kv_ranks))
        if tokens < 1:
            raise SimulationError(
                f"{self.spec} does not fit on {ranks} x {self.gpu}: its weights leave no room for a KV cache; "
                "use more GPUs a replica"
            )
        return tokens


@dataclass(frozen=True, slots=True)
class SimNode:
    """One node: `replicas` names the model of each replica on it, in order of its GPUs; those left over are parked.

    `dies` holds each GPU's factor on dynamic power, in the same order (None: drawn by the seed).
    """

    name: str
    gpu: str
    num_gpus: int
    replicas: tuple[str, ...]
    domain: str | None = None
    overhead: Overhead = field(default_factory=Overhead)
    dies: tuple[float, ...] | None = None


FailureKind = Literal["agent_silent", "manager_down", "node_death"]


@dataclass(frozen=True, slots=True)
class Failure:
    """What fails at `at_s`, for `for_s` unless it is a node, which is gone to the end.

    The agent of the replica `who` neither sends nor receives; its lease goes on running. The manager is gone; a new one
    then rebuilds from what the old one wrote down. The requests of the node `who` begin anew elsewhere, and its GPUs
    draw nothing.
    """

    kind: FailureKind
    at_s: float
    for_s: float = 0.0
    who: str = ""


@dataclass(frozen=True, slots=True)
class SimFleet:
    """Nodes and the models on them. A model's replicas are called `MODEL#0`, `MODEL#1`, ... in order of the nodes.

    `die_spread` is how much the dies' dynamic power differs (`die_factor`). `time_scale` slows the virtual GPUs as the
    paced worker does: durations, not watts.
    """

    nodes: tuple[SimNode, ...]
    models: tuple[SimModel, ...]
    domains: tuple[Domain, ...] = ()
    reserve_w: float = 0.0
    die_spread: float = 0.03
    time_scale: float = 1.0

    def model(self, name: str) -> SimModel:
        """The model of that name; `SimulationError` where there is none."""
        for model in self.models:
            if model.name == name:
                return model
        raise SimulationError(f"no model {name!r} in the fleet; there are: {', '.join(m.name for m in self.models)}")


@dataclass(frozen=True, slots=True)
class Messages:
    """Messages between manager and agents take `delay_s` and up to `jitter_s` more; a share `lost` never arrives.

    A driver call takes `driver_s` (NVML: FACTS).
    """

    delay_s: float = 0.002
    jitter_s: float = 0.002
    lost: float = 0.0
    driver_s: float = 0.02


@dataclass(frozen=True, slots=True)
class SimSetting:
    """One run. `interval_s` is the spacing of the time series; energy and draw over budget are counted apart.

    The budget is `budget_w`, W at node level, unless `plan` moves it: a schedule, or a signal to follow, in seconds of
    the run. `seed` decides the order of the dies, routing, when agents beat and how long messages take; the requests
    are given apart. `fail_safe_cap_w` as in the fleet file (None: the lowest cap).

    After the end the run goes on for up to `follow_s`, with the requests that then come, until each one that came
    before has its verdict; nothing but these verdicts is taken from that time.
    """

    fleet: SimFleet
    budget_w: float
    policy: Policy
    duration_s: float
    seed: int = 0
    interval_s: float = 0.5
    messages: Messages = field(default_factory=Messages)
    failures: tuple[Failure, ...] = ()
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    lease_s: float = 5.0
    fail_safe_cap_w: float | None = None
    plan: BudgetPlan | None = None
    follow_s: float = 0.0

    @property
    def deployment(self) -> Deployment:
        """The fleet as the manager's core is told of it."""
        return Deployment(
            budget_w=self.budget_w,
            policy_name=getattr(self.policy, "__module__", "policy"),
            policy=self.policy,
            models={model.name: DeployedModel(model.target) for model in self.fleet.models},
            ledger=LedgerConfig(reserve_w=self.fleet.reserve_w, lease_s=self.lease_s),
            domains=self.fleet.domains,
            fail_safe_cap_w=self.fail_safe_cap_w,
        )


#: Requests by model name.
Offered = Mapping[str, Trace]
