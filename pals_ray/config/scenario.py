"""Scenarios (YAML): fleets, loads, budgets, policies and seeds of one evaluation, checked before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pals_ray.config.fleet import DomainConfig, KnownGpu, KnownModel, OverheadConfig, Watts
from pals_ray.config.reader import ConfigError, StrictModel, check_mapping, read_content
from pals_ray.config.target import Seconds, TargetedModel
from pals_ray.simulation.setting import FailureKind
from pals_ray.types import Slo

#: The scenarios that come with pals-ray, in the checkout's top folder.
SHIPPED = Path(__file__).parents[2] / "scenarios"
#: Policies by the name that a scenario and a table give them, and what each leaves to the agents' controllers, which
#: are the same under all of them. `NAME@B` is that policy on engines that start at B sequences (`start_batch`).
POLICIES = {
    "static": "nothing: highest cap, batch limit at the start value (64, or @B), no budget",
    "uniform": "caps within an even split of the budget by GPU, batch limits",
    "proportional": "caps within a split by each replica's load, batch limits",
    "slack_steal": "caps within an even split whose unused watts move, batch limits",
    "batch_only": "batch limits; caps pinned at an even split of the budget",
    "power_only": "caps within grants by value; batch limits pinned at the start value",
    "pals": "caps and batch limits within grants by value",
    "exact": "the same; the budget divided by mixed-integer programming",
}
#: `static`'s batch limit, where its name says no other.
STATIC_BATCH = 64

Demand = Literal["own", "together"]
Tokens = Annotated[int, Field(ge=1)]
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


class ModelSpecEntry(TargetedModel):
    """A served model: which one it is, its tensor (and expert) parallelism, the batch that its engines start with."""

    name: KnownModel
    tensor_parallel: int = Field(1, ge=1, le=16)
    expert_parallel: int = Field(1, ge=1, le=16)
    max_batch: int = Field(256, ge=1, le=4096)


class LengthSpec(StrictModel):
    """Prompts and outputs of every length from the first to the second number, tokens, alike often."""

    prompt_tokens: tuple[Tokens, Tokens]
    output_tokens: tuple[Tokens, Tokens]

    @model_validator(mode="after")
    def _in_order(self) -> LengthSpec:
        if any(first > last for first, last in (self.prompt_tokens, self.output_tokens)):
            raise ValueError("lengths go from the shortest to the longest")
        return self


class FleetSpec(StrictModel):
    """Nodes and the models on them. With `lengths` requests are as long as these say, not as the trace has them."""

    name: str
    lengths: LengthSpec | None = None
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
    """Offered load: one case for each share of capacity, the highest requests/s at which a reference attains the SLO.

    `of` is that reference: `static` (highest cap) or `budget` (every GPU at its even part of the budget), at a batch
    limit of 64 either way. `peak_over_mean` scales the swings of a trace's arrivals so that its fullest 5 min have that
    many times the mean (None: unscaled). With `targets` models have no SLOs but tokens/s targets, a case for each share
    of what `static` serves flat out; that is then what `shares` are of, or with `closed` as many requests are always
    there as are served. `demands` adds a case each: with its `own` each model has the trace from
    another start, `together` all have their peaks at the same time (at the first budget only). At the start requests
    rise to the full load over `ramp_s`.
    """

    shares: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.9, 0.7, 0.5)
    of: Literal["static", "budget"] = "static"
    peak_over_mean: Annotated[float, Field(ge=1, le=10)] | None = None
    targets: tuple[Share, ...] = ()
    closed: bool = False
    demands: Annotated[tuple[Demand, ...], Field(min_length=1)] = ("own",)
    ramp_s: float = Field(60.0, ge=0, le=3600)

    @model_validator(mode="after")
    def _closed_for_targets(self) -> LoadSpec:
        if self.closed and not self.targets:
            raise ValueError("a closed loop serves what it can: it needs load.targets")
        return self


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
    """The budget, W at node level: `watts` (a case each), or `shares` of what the fleet is charged at its highest caps
    (a case each, `sweep_s` long); with neither, that charge itself. `event` adds a case; `regulation` replaces all."""

    watts: tuple[Watts, ...] = ()
    shares: tuple[Share, ...] = ()
    sweep_s: Seconds | None = None
    event: EventSpec | None = None
    regulation: RegulationSpec | None = None

    @field_validator("watts", mode="before")
    @classmethod
    def _one_is_a_list(cls, watts: object) -> object:
        return watts if isinstance(watts, list | tuple) else [watts]

    @model_validator(mode="after")
    def _one_way(self) -> BudgetSpec:
        if self.watts and self.shares:
            raise ValueError("give watts or shares, not both")
        if len(self.watts) > 1 and (self.event is not None or self.regulation is not None):
            raise ValueError("an event or a regulation signal goes with one budget")
        if self.regulation is not None and (self.event is not None or self.shares):
            raise ValueError("a regulation signal goes with neither an event nor shares")
        return self


class LatencyLimits(StrictModel):
    """A request is good within both, s."""

    ttft_s: Seconds
    tpot_s: Seconds


class LimitSet(LatencyLimits):
    """The limits of every model; those in `models` have others."""

    models: dict[str, LatencyLimits] = Field(default_factory=dict)

    def slo_of(self, model: ModelSpecEntry) -> Slo:
        """The SLO of a model: its own target's where that has limits, else these."""
        own = model.target.target().slo
        if own.judges:
            return own
        limits = self.models.get(model.name, self)
        return replace(own, ttft_s=limits.ttft_s, tpot_s=limits.tpot_s)


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
        name, at, batch = policy.partition("@")
        if name not in POLICIES or (at and not (batch.isdigit() and int(batch) > 0)):
            raise ValueError(f"unknown policy {policy!r}; possible are {', '.join(POLICIES)}, each with @BATCH too")
    if len(set(policies)) < len(policies):
        raise ValueError("a policy is there twice")
    return policies


class Scenario(StrictModel):
    """One evaluation: every fleet with every set of limits, load and budget, each with every policy and seed.

    `least_requests` are judged in each case, of all its seeds together: for that a run is longer than `duration_s`
    where it has to be. A gain counts at an attainment of `least_attainment` over all seeds, or `static`'s own where
    that is less. On the `tuning_seeds` capacities and the oracle's points, caps in steps of `oracle_step_w`, are
    found, apart from the reported ones.
    """

    name: str
    about: str
    duration_s: Annotated[float, Field(gt=0, le=86_400)]
    overhead: CitedOverhead
    fleets: Annotated[tuple[FleetSpec, ...], Field(min_length=1)]
    trace: TraceSpec
    load: LoadSpec = LoadSpec()
    budget: BudgetSpec = BudgetSpec()
    limits: dict[str, LimitSet] = Field({"server": LimitSet(ttft_s=2.0, tpot_s=0.1)}, min_length=1)
    failures: tuple[FailureSpec, ...] = ()
    policies: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_known_policies)]
    oracle: bool = False
    oracle_step_w: int = Field(5, ge=1)
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    tuning_seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (101,)
    least_requests: int = Field(0, ge=0)
    least_attainment: float = Field(0.987, gt=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        if len({fleet.name for fleet in self.fleets}) < len(self.fleets):
            raise ValueError("two fleets have the same name")
        if set(self.seeds) & set(self.tuning_seeds):
            raise ValueError("seeds and tuning_seeds overlap: what was tuned on a seed proves nothing there")
        if self.load.of == "budget" and not self.budget.watts:
            raise ValueError("load.of: budget needs budget.watts")
        event = self.budget.event
        if event is not None and not event.start_s < event.end_s <= self.duration_s:
            raise ValueError(f"the event must start before it ends, and end within {self.duration_s:g} s")
        served = {model.name for fleet in self.fleets for model in fleet.models}
        strange = sorted({name for limits in self.limits.values() for name in limits.models} - served)
        if strange:
            raise ValueError(f"limits of {', '.join(strange)}, which no fleet serves")
        if self.oracle and any(len(fleet.models) > 1 for fleet in self.fleets):
            raise ValueError("the oracle is for fleets of one model each")
        late = [failure for failure in self.failures if failure.at_s >= self.duration_s]
        if late:
            raise ValueError(f"a failure at {late[0].at_s:g} s comes after the end at {self.duration_s:g} s")
        return self


def start_batch(policy: str, max_batch: int) -> int:
    """What the engines of a model start at under a policy: its `@BATCH`, and never more than the scenario says."""
    name, _, batch = policy.partition("@")
    return min(int(batch) if batch else STATIC_BATCH if name == "static" else max_batch, max_batch)


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
