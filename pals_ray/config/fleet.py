"""What an operator writes: the fleet file as pydantic models, with bounds and messages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pals_ray.config.reader import StrictModel, check_mapping, read_content
from pals_ray.config.target import TargetedModel
from pals_ray.control.snapshot import Domain, Overhead
from pals_ray.models.specs import GPUS, MODELS

Watts = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def known_model(name: str) -> str:
    """The name of a model that the tables know. Raises ValueError."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(sorted(MODELS))}")
    return name


def _known_gpu(name: str) -> str:
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; possible are {', '.join(sorted(GPUS))}")
    return name


KnownModel = Annotated[str, AfterValidator(known_model)]
KnownGpu = Annotated[str, AfterValidator(_known_gpu)]


class OverheadConfig(StrictModel):
    """Node watts that caps do not control: `a_w + b * GPU watts` on every node."""

    a_w: float = Field(0.0, ge=0, allow_inf_nan=False)
    b: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)

    def overhead(self) -> Overhead:
        return Overhead(self.a_w, self.b)


class DomainConfig(StrictModel):
    """A rack or circuit with a budget of its own: the nodes whose Ray node label `label` has the value `value`."""

    name: str
    budget_w: Watts
    parent: str | None = None
    label: str | None = None
    value: str | None = None

    def domain(self) -> Domain:
        return Domain(self.name, self.budget_w, self.parent, self.label, self.value)


class VirtualNode(StrictModel):
    """The GPUs of a node without any: `count` modelled ones of one type."""

    gpu: KnownGpu = "A100-SXM"
    count: int = Field(4, ge=1, le=64)


class HardwareConfig(StrictModel):
    """`nvml` for NVIDIA GPUs, `virtual` for modelled ones, `auto` for NVML where the building machine has a GPU."""

    kind: Literal["nvml", "virtual", "auto"] = "auto"
    virtual: VirtualNode = VirtualNode()
    allow_unenforced: bool = False


def _has_an_id(llm_config: dict[str, Any]) -> dict[str, Any]:
    loading = llm_config.get("model_loading_config")
    if not isinstance(loading, dict) or not loading.get("model_id"):
        raise ValueError("llm_config needs model_loading_config.model_id")
    for key in ("engine_kwargs", "placement_group_config", "deployment_config"):
        if not isinstance(llm_config.get(key, {}), dict):
            raise ValueError(f"llm_config.{key} must be a mapping, not {llm_config[key]!r}")
    return llm_config


class ModelConfig(TargetedModel):
    """One model: Ray's own `LLMConfig` content, the operator's target, and how it is predicted.

    `stands_for` is a known model: what virtual GPUs take it for, and whose roofline predicts it where `profile`, a file
    of `pals profile` that the head node can read, does not.
    """

    llm_config: Annotated[dict[str, Any], AfterValidator(_has_an_id)]
    stands_for: KnownModel | None = None
    profile: str | None = None

    @property
    def model_id(self) -> str:
        return str(self.llm_config["model_loading_config"]["model_id"])

    @property
    def model_source(self) -> str:
        """Where Ray loads it from; by default its id."""
        return str(self.llm_config["model_loading_config"].get("model_source", self.model_id))

    @property
    def known_as(self) -> str:
        """The name to look up in our tables: that of the model it stands for, else of the one that it loads."""
        return self.stands_for or self.model_source

    @property
    def tensor_parallel(self) -> int:
        return int(self._engine_kwarg("tensor_parallel_size"))

    @property
    def num_gpus(self) -> int:
        """GPUs of one replica: tensor x pipeline parallel."""
        return self.tensor_parallel * int(self._engine_kwarg("pipeline_parallel_size"))

    @property
    def expert_parallel(self) -> int:
        """Over how many ranks whole experts are spread: all tensor-parallel ones where vLLM is told so, else 1."""
        return self.tensor_parallel if self._engine_kwarg("enable_expert_parallel", False) else 1

    def _engine_kwarg(self, name: str, default: Any = 1) -> Any:
        return self.llm_config.get("engine_kwargs", {}).get(name, default)

    @model_validator(mode="after")
    def _one_node_whole_gpus(self) -> ModelConfig:
        for key in ("tensor_parallel_size", "pipeline_parallel_size"):
            value = self._engine_kwarg(key)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.model_id}: {key} must be a whole number of at least 1, not {value!r}")
        if self._engine_kwarg("data_parallel_size") != 1:
            raise ValueError(f"{self.model_id}: data_parallel_size is not managed; use more Serve replicas instead")
        placement = self.llm_config.get("placement_group_config", {})
        strategy = placement.get("strategy", "STRICT_PACK")
        if strategy != "STRICT_PACK":
            raise ValueError(
                f"{self.model_id}: placement strategy {strategy} could spread one replica over several nodes, whose "
                "power could not be capped together; leave `strategy` out, or say STRICT_PACK"
            )
        bundles = placement.get("bundles") or [placement.get("bundle_per_worker") or {}]
        if not (isinstance(bundles, list) and all(isinstance(bundle, dict) for bundle in bundles)):
            raise ValueError(f"{self.model_id}: placement bundles are mappings such as {{GPU: 1}}, not {bundles!r}")
        for bundle in bundles:
            gpu = bundle.get("GPU", 0)
            if isinstance(gpu, bool) or not isinstance(gpu, int | float) or gpu != int(gpu):
                raise ValueError(
                    f"{self.model_id}: a bundle asks for {gpu} GPU; a power cap belongs to a whole GPU, so fractions "
                    "(and MIG slices) are not possible"
                )
        if placement.get("bundles"):
            with_gpu = sum(int(b.get("GPU", 0)) for b in bundles)
            if len(bundles) != self.num_gpus or with_gpu not in (0, self.num_gpus):
                raise ValueError(
                    f"{self.model_id}: the placement group has {len(bundles)} bundles with {with_gpu} GPUs, but tensor "
                    f"x pipeline parallel needs {self.num_gpus}, one bundle each"
                )
        return self


def _some_model(models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
    if not models:
        raise ValueError("the list is empty; name one model at least, by its llm_config")
    return models


def _import_path(policy: str) -> str:
    if not re.fullmatch(r"[\w.]+:\w+", policy):
        raise ValueError(f"{policy!r} is not an import path of the form package.module:function")
    return policy


class FleetConfig(StrictModel):
    """The whole fleet file. Watts are at node level: GPUs plus overhead."""

    budget_w: Watts
    reserve_w: float = Field(0.0, ge=0, allow_inf_nan=False)
    overhead: OverheadConfig = OverheadConfig()
    domains: tuple[DomainConfig, ...] = ()
    policy: Annotated[str, AfterValidator(_import_path)] = "policies.pals:allocate"
    hardware: HardwareConfig = HardwareConfig()
    time_scale: float = Field(2.0, ge=1, le=100)
    lease_s: float = Field(5.0, ge=1, le=3600)
    fail_safe_cap_w: Watts | None = None
    allow_parking: bool = False
    storage_path: str = "~/.pals-ray"
    models: Annotated[tuple[ModelConfig, ...], AfterValidator(_some_model)]

    @model_validator(mode="after")
    def _consistent(self) -> FleetConfig:
        ids = [model.model_id for model in self.models]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"model {', '.join(twice)} is there twice; give each model an id of its own")
        if self.reserve_w >= self.budget_w:
            raise ValueError(f"a reserve of {self.reserve_w:g} W leaves nothing of {self.budget_w:g} W")
        names = {domain.name for domain in self.domains}
        if len(names) < len(self.domains):
            raise ValueError("two domains have the same name")
        for domain in self.domains:
            if domain.parent is not None and domain.parent not in names:
                raise ValueError(f"domain {domain.name}: parent {domain.parent!r} is not a domain")
        _refuse_cycles({domain.name: domain.parent for domain in self.domains})
        if self.hardware.kind == "virtual":
            self._fits_virtual_node()
        return self

    def _fits_virtual_node(self) -> None:
        node = self.hardware.virtual
        for model in self.models:
            if model.num_gpus > node.count:
                raise ValueError(
                    f"{model.model_id} needs {model.num_gpus} GPUs on one node, which has {node.count} virtual ones"
                )
            if model.stands_for is None:
                raise ValueError(f"{model.model_id}: on virtual GPUs say which known model it `stands_for`")
        least_w = (1 + self.overhead.b) * GPUS[node.gpu].min_limit_w * node.count + self.overhead.a_w
        if self.budget_w - self.reserve_w < least_w:
            raise ValueError(
                f"a budget of {self.budget_w:g} W less {self.reserve_w:g} W of reserve is too small: one node of "
                f"{node.count} {node.gpu} needs {least_w:g} W with every GPU at its lowest cap"
            )


def _refuse_cycles(parents: dict[str, str | None]) -> None:
    for start in parents:
        seen, name = {start}, parents[start]
        while name is not None:
            if name in seen:
                raise ValueError(f"domain {start} is its own ancestor")
            seen.add(name)
            name = parents[name]


def load_fleet_config(path: str | Path) -> FleetConfig:
    """Read and check a fleet file (YAML). Raises `ConfigError` naming the file, the key and what is possible."""
    path = Path(path).expanduser()
    return parse_fleet_config(read_content(path, "fleet file"), str(path))


def parse_fleet_config(content: Any, source: str) -> FleetConfig:
    """Check a fleet's content; `source` names it in the message. Raises `ConfigError`."""
    return check_mapping(FleetConfig, content, source, "budget_w and models at least")
