"""What is known of GPUs and models before anything is measured: datasheet numbers and model configurations.

The numbers, each row with its source, are in `data/gpus.json` and `data/models.json`.
FACTS in a `source` stands for the project's design notes (`../shared/design/FACTS.md`), which name their own sources.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TypeVar

from pals_ray.errors import PalsError

T = TypeVar("T")


class SpecFileError(PalsError):
    """A row of a data file that lacks a key, or has one that is not known."""


class UnknownSpecError(PalsError):
    """A GPU or model that no table here describes."""


def read_table(name: str, make: Callable[..., T]) -> dict[str, T]:
    """`make(**row)` of every row of a data file of this package, by the row's first value, its name.

    Raises `SpecFileError` naming the file and the row.
    """
    out = {}
    for number, row in enumerate(json.loads(files("pals_ray.models").joinpath("data", name).read_text("utf-8")), 1):
        named = next(iter(row.values()), "empty")
        try:
            out[named] = make(**row)
        except TypeError as error:
            raise SpecFileError(f"models/data/{name}, row {number} ({named}): {error}") from error
    return out


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU type, from its datasheet.

    FLOP/s are dense tensor-core rates. `dense_fp8_flops_per_s` equals the 16-bit rate where the part has no FP8.
    `nvlink_bytes_per_s` counts both directions, as datasheets do. `power_is_one_second_average` says what NVML's plain
    power reading gives on this part. `pulses_clock` says that it keeps a cap which even its lowest SM clock would
    exceed, at the price of speed; other parts draw more than such a cap.
    """

    name: str
    min_limit_w: float
    max_limit_w: float
    default_limit_w: float
    idle_bare_w: float
    idle_context_w: float
    bandwidth_bytes_per_s: float
    dense_bf16_flops_per_s: float
    dense_fp8_flops_per_s: float
    max_sm_clock_mhz: float
    min_sm_clock_mhz: float
    memory_bytes: float
    nvlink_bytes_per_s: float
    power_is_one_second_average: bool
    pulses_clock: bool
    source: str


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One language model, from its configuration file.

    `total_params` and `active_params` are counts of weights (active: read for one token). `kv_layers` are the layers
    that keep a KV cache (fewer than `layers` in hybrids), `latent_kv_values` the values kept per token and layer by
    multi-head latent attention (0: ordinary heads), `state_values` the recurrent state per sequence of state-space
    layers. `experts` is 0 for a dense model.
    """

    name: str
    family: str
    total_params: float
    active_params: float
    layers: int
    hidden: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    active_experts: int = 0
    weight_bytes: float = 2.0
    kv_layers: int = 0
    latent_kv_values: int = 0
    state_values: float = 0.0
    source: str = field(default="", compare=False)

    @property
    def is_moe(self) -> bool:
        """Whether the model routes tokens to experts."""
        return self.experts > 0

    @property
    def expert_params(self) -> float:
        """Weights in routed experts: a token reads k of N, so total - active = expert x (1 - k / N)."""
        if not self.is_moe:
            return 0.0
        return (self.total_params - self.active_params) / (1.0 - self.active_experts / self.experts)

    @property
    def shared_params(self) -> float:
        """Weights that every token reads: attention, embeddings, shared experts, dense layers."""
        return self.total_params - self.expert_params

    @property
    def attending_layers(self) -> int:
        """Layers with a KV cache."""
        return self.kv_layers or self.layers

    @property
    def kv_values_per_token(self) -> float:
        """KV-cache values per token over all layers."""
        per_layer = self.latent_kv_values or 2 * self.kv_heads * self.head_dim
        return float(per_layer * self.attending_layers)


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How one replica spreads over GPUs. As in vLLM, experts are spread over the same ranks as tensors.

    With `expert` above 1 whole experts live on a rank, otherwise each expert is sliced over all ranks. Attention is
    always sliced over all ranks.
    """

    tensor: int = 1
    expert: int = 1

    @property
    def num_gpus(self) -> int:
        """GPUs of the group."""
        return max(self.tensor, self.expert)


#: Known GPUs and models by name. FP8 checkpoints are rows of their own.
GPUS = read_table("gpus.json", GpuSpec)
MODELS = read_table("models.json", ModelSpec)


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def find_gpu(name: str) -> GpuSpec:
    """The GPU named so, by our name or NVML's product name. Raises `UnknownSpecError`."""
    if name in GPUS:
        return GPUS[name]
    asked = _key(name)
    for spec in GPUS.values():
        chip, _, board = spec.name.partition("-")
        # NVML says "NVIDIA H100 80GB HBM3" for SXM parts and names the board only on PCIe and NVL ones.
        if _key(chip) in asked and (
            not board or board.lower() in asked or not {"pcie", "nvl"} & set(name.lower().split())
        ):
            return spec
    raise UnknownSpecError(f"unknown GPU {name!r}: known are {', '.join(GPUS)}")


def find_model(name: str) -> ModelSpec:
    """The model named so, with or without organisation and variant ("Qwen/Qwen3-30B-A3B-Instruct-2507").

    The longest known name that the asked one contains wins; FP8 rows match only a name that says FP8.
    Raises `UnknownSpecError`.
    """
    if name in MODELS:
        return MODELS[name]
    asked = _key(name)
    fp8 = "fp8" in asked
    named = [own for own in MODELS if own.endswith("-FP8") == fp8 and _key(own.removesuffix("-FP8")) in asked]
    if not named:
        raise UnknownSpecError(f"unknown model {name!r}: known are {', '.join(MODELS)}")
    return MODELS[max(named, key=len)]
