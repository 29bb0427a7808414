"""Scenarios (YAML): fleets, loads, budgets, policies and seeds of one evaluation, checked before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pals_ray.config.fleet import DomainConfig, KnownGpu, KnownModel, OverheadConfig, Seconds, TargetConfig, Watts
from pals_ray.config.reader import ConfigError, StrictModel, check_mapping, read_content
from pals_ray.simulation.setting import FailureKind

#: The scenarios that come with pals-ray, in the checkout's top folder.
SHIPPED = Path(__file__).parents[2] / "scenarios"
#: Policies by the name that a scenario and a table give them; `power_only@B` is the one at batch B.
POLICIES = (
    "static",
    "uniform",
    "proportional",
    "slack_steal",
    "batch_only",
    "power_only",
    "power_only_best",
    "pals",
    "exact",
)

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class CitedOverhead(OverheadConfig):
    """Node watts beside the GPUs', `a_w + b * GPU watts`, of one server with `gpus` GPUs, and which one that is.

    A node with more or fewer GPUs has `a_w` in proportion.
    """

    gpus: int = Field(4, ge=1, le=16)
    source: str


class NodeSpec(StrictModel):
    """`count` equal nodes of `gpus` GPUs; `models` names the model of each replica on each of them, in order."""

    gpu: KnownGpu
    gpus: int = Field(ge=1, le=16)
    count: int = Field(1, ge=1, le=1000)
    models: Annotated[tuple[str, ...], Field(min_length=1)]
    domain: str | None = None


class ModelSpecEntry(StrictModel):
    """A served model: which one it is, its tensor (and expert) parallelism, the batch that its engines start with."""

    name: KnownModel
    tensor_parallel: int = Field(1, ge=1, le=16)
    expert_parallel: int = Field(1, ge=1, le=16)
    max_batch: int = Field(256, ge=1, le=4096)
    target: TargetConfig = TargetConfig()


class FleetSpec(StrictModel):
    """Nodes and the models on them."""

    name: str
    nodes: Annotated[tuple[NodeSpec, ...], Field(min_length=1)]
    models: Annotated[tuple[ModelSpecEntry, ...], Field(min_length=1)]
    domains: tuple[DomainConfig, ...] = ()

    @model_validator(mode="after")
    def _replicas_fit(self) -> FleetSpec:
        parallel = {m.name: max(m.tensor_parallel, m.expert_parallel) for m in self.models}
        if len(parallel) < len(self.models):
            raise ValueError("a model is there twice; all its replicas are one entry")
        domains = {d.name for d in self.domains}
        for number, node in enumerate(self.nodes, start=1):
            unknown = sorted(set(node.models) - set(parallel))
            if unknown:
                raise ValueError(f"node {number} holds {', '.join(unknown)}, which is not among the fleet's models")
            needed = sum(parallel[name] for name in node.models)
            if needed > node.gpus:
                raise ValueError(f"node {number} has {node.gpus} GPUs, but its replicas need {needed}")
            if node.domain is not None and node.domain not in domains:
                raise ValueError(f"node {number} is in domain {node.domain!r}, which is not among the fleet's domains")
        placed = {name for node in self.nodes for name in node.models}
        idle = sorted(set(parallel) - placed)
        if idle:
            raise ValueError(f"{', '.join(idle)} has no replica on any node")
        for model in self.models:
            gpus = {node.gpu for node in self.nodes if model.name in node.models}
            if len(gpus) > 1:
                raise ValueError(f"{model.name} has replicas on {' and '.join(sorted(gpus))}; keep a model on one GPU")
        return self


class TraceSpec(StrictModel):
    """Where requests come from: a file of Azure's or Mooncake's format.

    `path` and `sample` (a small synthetic file of the same format) are relative to the scenario. `arrivals` says
    whether the file gives lengths alone, with synthetic arrivals of that kind, or arrivals too (`trace`).
    """

    format: Literal["azure", "mooncake"]
    path: str
    sample: str
    arrivals: Literal["poisson", "trace", "diurnal", "bursts"] = "poisson"
    length_factor: float = Field(1.0, gt=0, le=100, allow_inf_nan=False)
    max_model_len: int = Field(16_384, ge=16)


class LoadSpec(StrictModel):
    """Offered load: one case for each share of what a reference fleet serves when saturated.

    `of` is `static` (highest cap, the start batch) or `budget` (every GPU at its even part of the budget, the start
    batch). `peak_over_mean` scales the swings of a trace's arrivals so that its fullest 5 min have that many times
    the mean (None: unscaled). `saturated` adds a case in which requests never run out. At the start requests rise to
    the full load over `ramp_s`.
    """

    shares: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.9, 0.7, 0.5)
    of: Literal["static", "budget"] = "static"
    peak_over_mean: Annotated[float, Field(ge=1, le=10)] | None = None
    saturated: bool = False
    ramp_s: float = Field(60.0, ge=0, le=3600)


class EventSpec(StrictModel):
    """A fall of the budget to `share` of it from `start_s` to `end_s`, reached over `ramp_s`."""

    share: Share
    start_s: float = Field(ge=0)
    end_s: Seconds
    ramp_s: float = Field(0.0, ge=0)


class RegulationSpec(StrictModel):
    """A signal to follow: base and range as shares of the natural draw (what `static` draws at the same demand).

    The signal is synthetic (an Ornstein-Uhlenbeck process by the case's seed) unless `signal` names a file.
    """

    base_share: Share
    range_share: Share
    signal: str | None = None

    @model_validator(mode="after")
    def _within_draw(self) -> RegulationSpec:
        if self.base_share + self.range_share > 1:
            raise ValueError("base and range together exceed the natural draw: a cap cannot raise draw")
        if self.base_share <= self.range_share:
            raise ValueError("the signal's lowest target would be 0 W or less")
        return self


class BudgetSpec(StrictModel):
    """The budget, W at node level: `watts` as it is, or `shares` of what the fleet is charged at its highest caps (a
    case each, `sweep_s` long); with neither, that charge itself. `event` adds a case; `regulation` replaces all."""

    watts: Watts | None = None
    shares: tuple[Share, ...] = ()
    sweep_s: Seconds | None = None
    event: EventSpec | None = None
    regulation: RegulationSpec | None = None

    @model_validator(mode="after")
    def _one_way(self) -> BudgetSpec:
        if self.watts is not None and self.shares:
            raise ValueError("give watts or shares, not both")
        if self.regulation is not None and (self.event is not None or self.shares):
            raise ValueError("a regulation signal goes with neither an event nor shares")
        return self


class LimitSpec(StrictModel):
    """Latency limits as multiples of the p99 of `static` at the same demand."""

    itl_p99: float = Field(1.25, gt=1)
    ttft_p99: float = Field(2.0, gt=1)


class FailureSpec(StrictModel):
    """An agent that is silent or a manager that is down from `at_s` for `for_s`, or a node that dies at `at_s`."""

    kind: FailureKind
    at_s: float = Field(ge=0)
    for_s: Seconds | None = None
    who: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> FailureSpec:
        if self.kind != "manager_down" and self.who is None:
            raise ValueError(f"{self.kind} needs `who`: the replica (MODEL#0) or the node (node-1)")
        if self.kind != "node_death" and self.for_s is None:
            raise ValueError(f"{self.kind} needs for_s")
        return self


def _known_policies(policies: tuple[str, ...]) -> tuple[str, ...]:
    for policy in policies:
        name, _, batch = policy.partition("@")
        if name not in POLICIES or (batch and (name != "power_only" or not batch.isdigit() or int(batch) < 1)):
            raise ValueError(f"unknown policy {policy!r}; possible are {', '.join(POLICIES)}, power_only@BATCH")
    if len(set(policies)) < len(policies):
        raise ValueError("a policy is there twice")
    return policies


class Scenario(StrictModel):
    """One evaluation: every fleet under every load and every budget, each with every policy and seed.

    `violation_limit` is the violation rate up to which a gain counts (`static`'s own where that is larger).
    `tuning_seeds` are those that `power_only_best` is tuned on, apart from the reported ones.
    """

    name: str
    about: str
    duration_s: Annotated[float, Field(gt=0, le=86_400)]
    overhead: CitedOverhead
    fleets: Annotated[tuple[FleetSpec, ...], Field(min_length=1)]
    trace: TraceSpec
    load: LoadSpec = LoadSpec()
    budget: BudgetSpec = BudgetSpec()
    limits: LimitSpec = LimitSpec()
    failures: tuple[FailureSpec, ...] = ()
    policies: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_known_policies)]
    oracle: bool = False
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    tuning_seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (101,)
    violation_limit: float = Field(0.01, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        if len({fleet.name for fleet in self.fleets}) < len(self.fleets):
            raise ValueError("two fleets have the same name")
        if set(self.seeds) & set(self.tuning_seeds):
            raise ValueError("seeds and tuning_seeds overlap: what was tuned on a seed proves nothing there")
        if self.load.of == "budget" and self.budget.watts is None:
            raise ValueError("load.of: budget needs budget.watts")
        event = self.budget.event
        if event is not None and not event.start_s < event.end_s <= self.duration_s:
            raise ValueError(f"the event must start before it ends, and end within {self.duration_s:g} s")
        if self.oracle and any(len(fleet.models) > 1 for fleet in self.fleets):
            raise ValueError("the oracle is for fleets of one model each")
        late = [failure for failure in self.failures if failure.at_s >= self.duration_s]
        if late:
            raise ValueError(f"a failure at {late[0].at_s:g} s comes after the end at {self.duration_s:g} s")
        return self


def find_scenario(asked: str | Path) -> Path:
    """The file that a name of a shipped scenario or a path means. Raises `ConfigError` with what there is."""
    path = Path(asked).expanduser()
    if path.suffix in {".yaml", ".yml"} or path.exists():
        return path
    shipped = SHIPPED / f"{asked}.yaml"
    if not shipped.is_file():
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml"))) or "none here"
        raise ConfigError(f"no scenario {asked!r}: shipped are {names}; or give the path of a YAML file")
    return shipped


def load_scenario(path: str | Path) -> Scenario:
    """Read and check a scenario. Raises `ConfigError` naming the file, the key and what is possible."""
    path = Path(path).expanduser()
    content = read_content(path, "scenario")
    return check_mapping(Scenario, content, str(path), "name, fleets, trace and policies at least")
