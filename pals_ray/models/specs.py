"""What is known of GPUs and models before anything is measured: datasheet numbers and model configurations.

FACTS in a `source` stands for the project's design notes (`../shared/design/FACTS.md`), which name their own sources.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pals_ray.errors import PalsError


class UnknownSpecError(PalsError):
    """A GPU or model that no table here describes."""

    def __init__(self, kind: str, asked: str, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown {kind} {asked!r}: known are {', '.join(known)}")
        self.kind = kind
        self.asked = asked
        self.known = known

    def __reduce__(self) -> tuple[type[UnknownSpecError], tuple[str, str, tuple[str, ...]]]:
        return UnknownSpecError, (self.kind, self.asked, self.known)


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU type, from its datasheet.

    FLOP/s are dense tensor-core rates. `dense_fp8_flops_per_s` equals the 16-bit rate where the part has no FP8.
    `nvlink_bytes_per_s` counts both directions, as datasheets do. `power_is_one_second_average` says what NVML's plain
    power reading gives on this part.
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


_GB = 1e9
_T = 1e12

GPUS: dict[str, GpuSpec] = {
    spec.name: spec
    for spec in (
        GpuSpec(
            name="V100-SXM2",
            min_limit_w=100,
            max_limit_w=300,
            default_limit_w=300,
            idle_bare_w=39,
            idle_context_w=56,
            bandwidth_bytes_per_s=900 * _GB,
            dense_bf16_flops_per_s=125 * _T,
            dense_fp8_flops_per_s=125 * _T,
            max_sm_clock_mhz=1530,
            min_sm_clock_mhz=135,
            memory_bytes=32 * _GB,
            nvlink_bytes_per_s=300 * _GB,
            power_is_one_second_average=False,
            source="NVIDIA V100 datasheet (fp16: the part has no bf16); limits: FACTS; clocks: nvidia-smi of the SXM2 "
            "part; idle: least mean draw in Zeus's V100 file (39 W) and between kernels in GridPilot's E2 (56 W)",
        ),
        GpuSpec(
            name="A100-SXM",
            min_limit_w=100,
            max_limit_w=400,
            default_limit_w=400,
            idle_bare_w=54,
            idle_context_w=80,
            bandwidth_bytes_per_s=2039 * _GB,
            dense_bf16_flops_per_s=312 * _T,
            dense_fp8_flops_per_s=312 * _T,
            max_sm_clock_mhz=1410,
            min_sm_clock_mhz=210,
            memory_bytes=80 * _GB,
            nvlink_bytes_per_s=600 * _GB,
            power_is_one_second_average=False,
            source="NVIDIA A100 80GB SXM datasheet; limits and idle: FACTS; clocks: nvidia-smi of the part",
        ),
        GpuSpec(
            name="H100-SXM",
            min_limit_w=200,
            max_limit_w=700,
            default_limit_w=700,
            idle_bare_w=72,
            idle_context_w=122,
            bandwidth_bytes_per_s=3350 * _GB,
            dense_bf16_flops_per_s=989.4 * _T,
            dense_fp8_flops_per_s=1978.9 * _T,
            max_sm_clock_mhz=1980,
            min_sm_clock_mhz=345,
            memory_bytes=80 * _GB,
            nvlink_bytes_per_s=900 * _GB,
            power_is_one_second_average=True,
            source="NVIDIA H100 SXM datasheet; limits and idle: FACTS; clocks: nvidia-smi of the part",
        ),
        GpuSpec(
            name="B200",
            min_limit_w=200,
            max_limit_w=1000,
            default_limit_w=1000,
            idle_bare_w=187,
            idle_context_w=204,
            bandwidth_bytes_per_s=7700 * _GB,
            dense_bf16_flops_per_s=2250 * _T,
            dense_fp8_flops_per_s=4500 * _T,
            max_sm_clock_mhz=1965,
            min_sm_clock_mhz=120,
            memory_bytes=180 * _GB,
            nvlink_bytes_per_s=1800 * _GB,
            power_is_one_second_average=True,
            source="NVIDIA HGX/DGX B200 datasheet; limits and idle: FACTS; clocks: nvidia-smi of the part",
        ),
    )
}


def _hf(repository: str) -> str:
    return f"config.json and model card of huggingface.co/{repository}"


_QWEN3_30B = ModelSpec(
    "Qwen3-30B-A3B", "Qwen3 MoE", 30.5e9, 3.3e9, 48, 2048, 32, 4, 128, 128, 8, source=_hf("Qwen/Qwen3-30B-A3B")
)
_QWEN3_235B = ModelSpec(
    "Qwen3-235B-A22B", "Qwen3 MoE", 235e9, 22e9, 94, 4096, 64, 4, 128, 128, 8, source=_hf("Qwen/Qwen3-235B-A22B")
)
_LLAMA_405B = ModelSpec(
    "Llama-3.1-405B", "Llama 3", 405.9e9, 405.9e9, 126, 16384, 128, 8, 128, source=_hf("meta-llama/Llama-3.1-405B")
)
_LLAMA_70B = ModelSpec(
    "Llama-3.1-70B", "Llama 3", 70.6e9, 70.6e9, 80, 8192, 64, 8, 128, source=_hf("meta-llama/Llama-3.1-70B")
)

#: One row per model, one source per row. FP8 checkpoints are rows of their own.
MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "Llama-3.1-8B", "Llama 3", 8.03e9, 8.03e9, 32, 4096, 32, 8, 128, source=_hf("meta-llama/Llama-3.1-8B")
        ),
        _LLAMA_70B,
        replace(_LLAMA_70B, name="Llama-3.3-70B", source=_hf("meta-llama/Llama-3.3-70B-Instruct")),
        _LLAMA_405B,
        replace(_LLAMA_405B, name="Llama-3.1-405B-FP8", weight_bytes=1.0, source=_hf("meta-llama/Llama-3.1-405B-FP8")),
        ModelSpec("Qwen3-8B", "Qwen3 dense", 8.2e9, 8.2e9, 36, 4096, 32, 8, 128, source=_hf("Qwen/Qwen3-8B")),
        ModelSpec("Qwen3-14B", "Qwen3 dense", 14.8e9, 14.8e9, 40, 5120, 40, 8, 128, source=_hf("Qwen/Qwen3-14B")),
        ModelSpec("Qwen3-32B", "Qwen3 dense", 32.8e9, 32.8e9, 64, 5120, 64, 8, 128, source=_hf("Qwen/Qwen3-32B")),
        _QWEN3_30B,
        _QWEN3_235B,
        replace(
            _QWEN3_235B,
            name="Qwen3-235B-A22B-FP8",
            weight_bytes=1.0,
            source=_hf("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8"),
        ),
        ModelSpec("gemma-3-12b", "Gemma 3", 12.2e9, 12.2e9, 48, 3840, 16, 8, 256, source=_hf("google/gemma-3-12b-it")),
        ModelSpec("gemma-3-27b", "Gemma 3", 27.4e9, 27.4e9, 62, 5376, 32, 16, 128, source=_hf("google/gemma-3-27b-it")),
        # Mamba-2 state: mamba layers x heads x head dim x state size = 27 (28) x 128 x 80 x 128 values a sequence.
        ModelSpec(
            "Nemotron-Nano-9B-v2",
            "Nemotron",
            8.9e9,
            8.9e9,
            56,
            4480,
            40,
            8,
            128,
            kv_layers=4,
            state_values=27 * 128 * 80 * 128,
            source=_hf("nvidia/NVIDIA-Nemotron-Nano-9B-v2") + ", arXiv 2508.14444",
        ),
        ModelSpec(
            "Nemotron-Nano-12B-v2",
            "Nemotron",
            12.3e9,
            12.3e9,
            62,
            5120,
            40,
            8,
            128,
            kv_layers=6,
            state_values=28 * 128 * 80 * 128,
            source=_hf("nvidia/NVIDIA-Nemotron-Nano-12B-v2") + ", arXiv 2508.14444",
        ),
        ModelSpec(
            "Llama-4-Scout",
            "Llama 4",
            109e9,
            17e9,
            48,
            5120,
            40,
            8,
            128,
            16,
            1,
            source=_hf("meta-llama/Llama-4-Scout-17B-16E"),
        ),
        ModelSpec(
            "Llama-4-Maverick-FP8",
            "Llama 4",
            400e9,
            17e9,
            48,
            5120,
            40,
            8,
            128,
            128,
            1,
            weight_bytes=1.0,
            source=_hf("meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8"),
        ),
        ModelSpec(
            "DeepSeek-V3.1",
            "DeepSeek",
            671e9,
            37e9,
            61,
            7168,
            128,
            128,
            128,
            256,
            8,
            weight_bytes=1.0,
            latent_kv_values=576,
            source=_hf("deepseek-ai/DeepSeek-V3.1") + ", arXiv 2412.19437",
        ),
        ModelSpec(
            "DeepSeek-V2-Lite",
            "DeepSeek",
            15.7e9,
            2.4e9,
            27,
            2048,
            16,
            16,
            128,
            64,
            6,
            latent_kv_values=576,
            source=_hf("deepseek-ai/DeepSeek-V2-Lite") + ", arXiv 2405.04434",
        ),
        ModelSpec(
            "Mixtral-8x7B",
            "Mixtral",
            46.7e9,
            12.9e9,
            32,
            4096,
            32,
            8,
            128,
            8,
            2,
            source=_hf("mistralai/Mixtral-8x7B-v0.1") + ", arXiv 2401.04088",
        ),
        ModelSpec(
            "OLMoE-1B-7B",
            "OLMoE",
            6.9e9,
            1.3e9,
            16,
            2048,
            16,
            16,
            128,
            64,
            8,
            source=_hf("allenai/OLMoE-1B-7B-0924") + ", arXiv 2409.02060",
        ),
    )
}


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
        if chip.lower() in asked and (
            not board or board.lower() in asked or not {"pcie", "nvl"} & set(name.lower().split())
        ):
            return spec
    raise UnknownSpecError("GPU", name, tuple(GPUS))


def find_model(name: str) -> ModelSpec:
    """The model named so, with or without organisation and variant ("Qwen/Qwen3-30B-A3B-Instruct-2507").

    The longest known name that the asked one contains wins; FP8 rows match only a name that says FP8.
    Raises `UnknownSpecError`.
    """
    if name in MODELS:
        return MODELS[name]
    asked = _key(name)
    fp8 = "fp8" in asked
    best: ModelSpec | None = None
    for spec in MODELS.values():
        key = _key(spec.name.removesuffix("-FP8"))
        if key in asked and (spec.name.endswith("-FP8") == fp8) and (best is None or len(spec.name) > len(best.name)):
            best = spec
    if best is None:
        raise UnknownSpecError("model", name, tuple(MODELS))
    return best
