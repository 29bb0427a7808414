"""Constants per GPU type that no datasheet gives, with where each came from.

The numbers are in `data/silicon_constants.json`, written by `python -m pals_ray.bench.calibrate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pals_ray.models.specs import find_gpu, read_table


@dataclass(frozen=True, slots=True)
class SiliconConstants:
    """What the datasheet does not say of a GPU type and its serving stack.

    Efficiencies are shares of the datasheet's rates. Powers are shares of (highest limit - idle draw with a context):
    `active_power` at any clock while a step runs, `busy_power` with the clock, `occupancy_power` with the clock and
    the tokens at work, the others at full use of the datasheet's FLOP/s or bandwidth. `overlap` is the p of the norm
    joining memory and compute time, `fabric_knee` the clock share below which memory throughput follows the clock,
    `fabric_sharpness` how suddenly. `activation_passes` is how often a layer's hidden state goes through memory.
    `cap_margin` is how far below a binding cap the mean draw lies. Overheads are seconds of host and launch time:
    `prefill_layer_overhead_s` comes on top in steps with prompt tokens, which run outside the full CUDA graph,
    `expert_layer_overhead_s` in mixture-of-experts layers (routing and permutation).
    """

    memory_efficiency: float
    compute_efficiency: float
    overlap: float
    fabric_knee: float
    fabric_sharpness: float
    activation_passes: float
    step_overhead_s: float
    layer_overhead_s: float
    prefill_layer_overhead_s: float
    expert_layer_overhead_s: float
    sequence_overhead_s: float
    all_reduce_latency_s: float
    link_efficiency: float
    expert_imbalance: float
    clock_exponent: float
    active_power: float
    busy_power: float
    compute_power: float
    fabric_power: float
    dram_power: float
    occupancy_power: float
    cap_margin: float


def _row(gpu: str, provenance: str, **constants: float) -> tuple[str, SiliconConstants]:
    return provenance, SiliconConstants(**constants)


_ROWS = read_table("silicon_constants.json", _row)
CONSTANTS = {name: constants for name, (_, constants) in _ROWS.items()}


def constants_for(gpu: str) -> SiliconConstants:
    """Constants of a GPU type by any name that `find_gpu` knows. Raises `UnknownSpecError`."""
    return CONSTANTS[find_gpu(gpu).name]


def provenance_of(gpu: str) -> str:
    """Which data a GPU type's constants came from, in a sentence. Raises `UnknownSpecError`."""
    return _ROWS[find_gpu(gpu).name][0]
