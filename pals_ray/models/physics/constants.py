"""Constants per GPU type that no datasheet gives, with where each came from.

The numbers are in `data/silicon_constants.json`, written by `python -m pals_ray.bench.calibrate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pals_ray.models.specs import find_gpu, read_table


def _calibrated(start: float, spread: float | None = None) -> Any:
    """A constant that has to be given: where its calibration starts, and how far it may plausibly lie from there.

    `spread` is the standard deviation of its log; None: not fitted (`pals_ray.bench.calibrate`).
    """
    return field(metadata={"start": start, "spread": spread})


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

    Energy per cycle falls with the clock as `voltage_floor + (1 - voltage_floor) clock^(clock_exponent - 1)`: below
    some clock the voltage falls no further. `latency_clock_share` is the part of the overheads of layers, experts and
    all-reduces that runs in SM cycles, so as 1 / clock. Both are 0 on a GPU type of which no measurement tells them:
    only serving under caps does.
    """

    memory_efficiency: float = _calibrated(0.8, 0.08)
    compute_efficiency: float = _calibrated(0.7, 0.1)
    overlap: float = _calibrated(3.0, 0.15)
    fabric_knee: float = _calibrated(0.5, 0.15)
    fabric_sharpness: float = _calibrated(4.0)
    activation_passes: float = _calibrated(25.0, 0.4)
    step_overhead_s: float = _calibrated(1e-3, 0.5)
    layer_overhead_s: float = _calibrated(30e-6, 0.4)
    prefill_layer_overhead_s: float = _calibrated(100e-6, 0.4)
    expert_layer_overhead_s: float = _calibrated(100e-6, 0.4)
    sequence_overhead_s: float = _calibrated(40e-6, 0.5)
    all_reduce_latency_s: float = _calibrated(15e-6, 0.4)
    link_efficiency: float = _calibrated(0.6, 0.2)
    expert_imbalance: float = _calibrated(1.3, 0.15)
    clock_exponent: float = _calibrated(2.4, 0.1)
    active_power: float = _calibrated(0.1, 0.4)
    busy_power: float = _calibrated(0.15, 0.3)
    compute_power: float = _calibrated(0.8, 0.3)
    fabric_power: float = _calibrated(0.3, 0.3)
    dram_power: float = _calibrated(0.2, 0.3)
    occupancy_power: float = _calibrated(0.2, 0.5)
    cap_margin: float = _calibrated(0.025)
    voltage_floor: float = _calibrated(0.0)
    latency_clock_share: float = _calibrated(0.0)


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
