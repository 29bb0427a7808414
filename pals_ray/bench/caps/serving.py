"""What is measured of serving under power caps, and the constants of A100 and RTX PRO 6000 that it gives.

A100: FACTS's cells of the sweep that PALS's first author published (A100, TP 4), and the energy of a step in the
ML.ENERGY Leaderboard v2. RTX PRO 6000: MMBT's sweep of vLLM on one GPU. Both start from H100's constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pals_ray.bench.caps.fit import POWER_LAW, SPREAD, gauss_newton, moved, robust
from pals_ray.models.physics.constants import SiliconConstants
from pals_ray.models.physics.roofline import RooflineModel, Workload
from pals_ray.models.physics.step_cost import GroupPhysics
from pals_ray.models.power_model import FloatArray
from pals_ray.models.specs import Parallelism, find_gpu, find_model

#: Mean draw under a binding cap lies 0 to 1 % below it (FACTS, "PALS"; MMBT: 0.4 to 0.6 %).
_MARGIN = 0.005
#: Where the constants that only capped serving tells start, and the standard deviation of their logs. Above a voltage
#: floor the exponent describes only the steep end of the clocks, so it is another one than H100's.
_START = {"voltage_floor": 0.4, "latency_clock_share": 0.5, "clock_exponent": 6.0}
_SPREAD = SPREAD | {"voltage_floor": 0.2, "latency_clock_share": 0.05, "clock_exponent": 0.2}
_CAPPED = (*POWER_LAW, "voltage_floor", "latency_clock_share")
#: How far another generation than H100's may deviate from it, in spreads (as for the V100).
_GENERATION = 4.0


@dataclass(frozen=True, slots=True)
class CapFigures:
    """FACTS's cells of one model: tokens/s at `A100_CAPS_W` over those at 400 W and natural W of one GPU at batch 64,
    and natural W at batch 1."""

    model: str
    relative_tokens: tuple[float, ...]
    natural_w: float
    single_w: float


A100_CAPS_W = (150.0, 200.0, 250.0, 300.0)
#: FACTS, "PALS". At batch 1 it gives the draw by how far the constants transferred from H100 were above it, 40 to 50 W:
#: they drew 228 and 269 W.
A100_CELLS = (
    CapFigures("DeepSeek-MoE-16B", (0.59, 0.83, 0.93, 0.97), 312.0, 183.0),
    CapFigures("Mixtral-8x7B", (0.48, 0.71, 0.86, 0.93), 379.0, 224.0),
)
A100_PARALLELISM = Parallelism(tensor=4)
#: HellaSwag's prompts and answers, the load of PALS's profiles.
A100_WORKLOAD = Workload(prompt_tokens=190.0, output_tokens=5.0)
#: FACTS: at 100 W tokens/s are .2 to .5 of those at 150 W; the middle, and about half the way to the ends (logs).
_A100_COLLAPSE = (0.32, 0.25)
_RELATIVE_TOLERANCE = np.array([0.017, 0.01, 0.01, 0.01])
#: The Leaderboard's part has 40 GB of slower memory.
_A100_40GB_BANDWIDTH = 1.555e12
_V2_PROMPT_TOKENS = 256.0

#: MMBT's load: one prompt of about this length, 200 tokens out.
MMBT_WORKLOAD = Workload(prompt_tokens=64.0, output_tokens=200.0)
_RTX_SERVING = (
    "memory_efficiency",
    "compute_efficiency",
    "overlap",
    "step_overhead_s",
    "layer_overhead_s",
    "prefill_layer_overhead_s",
    "expert_layer_overhead_s",
    "sequence_overhead_s",
)
#: Tolerances of logs: tokens/s against the mean of a curve, W, clock; and of that mean.
_RTX_TOLERANCE = np.array([[0.008], [0.015], [0.016]])
_RTX_MEAN_TOLERANCE = 0.05


def a100_cells(model: str, constants: SiliconConstants) -> tuple[FloatArray, FloatArray]:
    """Tokens/s and W of one GPU at batch 1 (row 0) and 64 (row 1), at 100 W, `A100_CAPS_W` and 400 W."""
    physics = GroupPhysics(find_gpu("A100-SXM"), find_model(model), A100_PARALLELISM, constants)
    caps_w = np.array([100.0, *A100_CAPS_W, 400.0])
    said = RooflineModel(physics, A100_WORKLOAD).predict(caps_w, np.array([[1.0], [64.0]]))
    return said.throughput_tokens_per_s, said.power_w / A100_PARALLELISM.num_gpus


def _cell_residuals(cells: CapFigures, constants: SiliconConstants) -> FloatArray:
    tokens, power_w = a100_cells(cells.model, constants)
    relative = tokens[1, 1:5] / tokens[1, 5] - np.array(cells.relative_tokens)
    natural = np.log(power_w[:, 5] / np.array([cells.single_w, cells.natural_w])) / np.array([0.04, 0.03])
    middle, width = _A100_COLLAPSE
    return np.concatenate(
        [relative / _RELATIVE_TOLERANCE, natural, np.log(tokens[:, 0] / tokens[:, 1] / middle) / width]
    )


def v2_energy_errors(
    measured: Mapping[tuple[str, int], FloatArray], constants: SiliconConstants
) -> dict[tuple[str, int], FloatArray]:
    """ln(predicted / measured) of a step's energy above idle draw, by (model, tensor parallelism).

    vLLM of 2024 left GPUs waiting for the host for most of a step, so mean draws say little, but the energy of the work
    does: (draw - idle) x step time.
    """
    gpu = replace(find_gpu("A100-SXM"), bandwidth_bytes_per_s=_A100_40GB_BANDWIDTH)
    out = {}
    for (name, tensor), rows in measured.items():
        batch, tokens_per_s, power_w, output_tokens = rows.T
        model = GroupPhysics(gpu, find_model(name), Parallelism(tensor), constants)
        workload = Workload(_V2_PROMPT_TOKENS, float(output_tokens.mean()))
        said = RooflineModel(model, workload).predict(gpu.default_limit_w, batch)
        idle_w = tensor * gpu.idle_context_w
        energy_j = (said.power_w - idle_w) * batch / said.throughput_tokens_per_s
        out[name, tensor] = np.log(energy_j / ((power_w - idle_w) * batch / tokens_per_s))
    return out


def fit_a100(h100: SiliconConstants, v2: Mapping[tuple[str, int], FloatArray]) -> SiliconConstants:
    """A100's power law and what follows its clock; how efficiently it serves stays H100's."""
    start = replace(h100, cap_margin=_MARGIN, **_START)

    def f(x: FloatArray) -> FloatArray:
        constants = moved(start, _SPREAD, _CAPPED, x)
        cells = [_cell_residuals(cells, constants) for cells in A100_CELLS]
        # A curve of many batches says little more than one of few.
        energies = [robust(e / 0.3) / np.sqrt(len(e)) for e in v2_energy_errors(v2, constants).values()]
        return np.concatenate([*cells, *energies, x / _GENERATION])

    return moved(start, _SPREAD, _CAPPED, gauss_newton(f, len(_CAPPED), step=0.03, halvings=8))


def rtx_cells(model: str, seqs: float, caps_w: FloatArray, constants: SiliconConstants) -> FloatArray:
    """Tokens/s, W and SM clock (MHz) at these caps, shape 3 x caps: what MMBT measured of (model, concurrency)."""
    gpu = find_gpu("RTX PRO 6000")
    physics = GroupPhysics(gpu, find_model(model), Parallelism(), constants)
    said = RooflineModel(physics, MMBT_WORKLOAD).predict(caps_w, seqs)
    kv_tokens = seqs * (MMBT_WORKLOAD.prompt_tokens + MMBT_WORKLOAD.output_tokens / 2.0)
    clocks = physics.sweep(caps_w, seqs, kv_tokens).clock * gpu.max_sm_clock_mhz
    return np.stack([said.throughput_tokens_per_s, said.power_w, clocks])


def fit_rtx_pro_6000(h100: SiliconConstants, sweep: Mapping[tuple[str, float], FloatArray]) -> SiliconConstants:
    """RTX PRO 6000's constants from MMBT's sweep."""
    start = replace(h100, cap_margin=_MARGIN, **_START)
    names = (*_CAPPED, *_RTX_SERVING)

    def f(x: FloatArray) -> FloatArray:
        constants = moved(start, _SPREAD, names, x)
        parts = []
        for (model, seqs), rows in sweep.items():
            errors = np.log(rtx_cells(model, seqs, rows[:, 0], constants) / rows[:, 1:].T)
            # All requests are one prompt, so they share experts as independent ones would not: speed counts little.
            mean = errors[0].mean()
            errors[0] -= mean
            parts += [(errors / _RTX_TOLERANCE).reshape(-1), robust(np.array([mean / _RTX_MEAN_TOLERANCE]))]
        return np.concatenate([*parts, x[: len(_CAPPED)] / _GENERATION, x[len(_CAPPED) :]])

    return moved(start, _SPREAD, names, gauss_newton(f, len(names), step=0.03, halvings=8))
