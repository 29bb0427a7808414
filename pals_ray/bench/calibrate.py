"""Fits `silicon_constants.json` to public data: `python -m pals_ray.bench.calibrate DATA_FOLDER`.

H100 and B200 are fitted together on the ML.ENERGY file (constants common to both, and a deviation each), with what
FACTS says of capped GPUs; V100 takes H100's serving constants and its power law from GridPilot's E1. A100 and RTX PRO
6000 start from H100's and are fitted to capped serving (`caps`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import typer

from pals_ray.bench.caps.fit import POWER_LAW, SPREAD, gauss_newton, moved, robust, slopes
from pals_ray.bench.caps.serving import fit_a100, fit_rtx_pro_6000
from pals_ray.bench.measured_data import Curve, load_gridpilot_e1, load_mlenergy, load_mlenergy_v2, load_mmbt
from pals_ray.models.physics.constants import SiliconConstants
from pals_ray.models.physics.roofline import RooflineModel
from pals_ray.models.physics.step_cost import GroupPhysics, StepWork
from pals_ray.models.power_model import FloatArray
from pals_ray.models.specs import Parallelism, find_gpu, find_model

_START = SiliconConstants(**{constant.name: constant.metadata["start"] for constant in fields(SiliconConstants)})
_FITTED = tuple(SPREAD)
_CAP_LAW = ("clock_exponent", "active_power", "busy_power", "occupancy_power", "compute_power", "fabric_knee")
# How far a GPU type may deviate from the common constants, as a share of the spread: less for constants of hosts and
# kernels, which are alike everywhere, and the whole spread for powers, since chips differ.
_DEVIATION = np.array([1.0 if name.endswith("_power") else 0.4 for name in _FITTED])
_ITERATIONS = 10

# How far a sensible model may lie from one configuration (std of logs): throughput, power, median ITL.
_TOLERANCE = np.array([[0.12], [0.08], [0.3]])

#: FACTS, H100: cap (W) -> SM clock (MHz) of a ViT, and share of full throughput in compute-bound training.
H100_CAPS_W = (200.0, 300.0, 400.0, 500.0, 600.0, 700.0)
H100_CLOCKS_MHZ = (625.0, 1132.0, 1501.0, 1731.0, 1889.0, 1969.0)
H100_THROUGHPUT = (0.320, 0.594, 0.821, 0.915, 0.966, 1.0)
#: A compute-bound step: one full chunk of prompts (vLLM's 8,192 tokens).
COMPUTE_BOUND = StepWork(prefill_tokens=8192, prefill_context_tokens=512)
#: FACTS, B200 decoding a 235B MoE: cap (W) -> share of uncapped throughput.
B200_CAPS_W = (430.0, 350.0)
B200_THROUGHPUT = (0.99, 0.64)


def log_errors(constants: SiliconConstants, curves: Sequence[Curve]) -> FloatArray:
    """ln(predicted / measured) of throughput, power and median ITL, shape 3 x points."""
    out = []
    for c in curves:
        gpu = find_gpu(c.gpu)
        model = RooflineModel(GroupPhysics(gpu, find_model(c.model_id), c.parallelism, constants))
        predicted = model.predict(gpu.max_limit_w, c.table.batch).floats()[:3]
        measured = (c.table.throughput_tokens_per_s, c.table.power_w, c.table.latency["itl_p50_s"])
        out.append(np.log(np.divide(predicted, measured)))
    return np.concatenate(out, axis=1)


def h100_capped(constants: SiliconConstants) -> tuple[FloatArray, FloatArray]:
    """SM clock (MHz) and share of full throughput of a compute-bound step at `H100_CAPS_W`."""
    gpu = find_gpu("H100-SXM")
    physics = GroupPhysics(gpu, find_model("Llama-3.1-8B"), Parallelism(), constants)
    steps = [physics.step(COMPUTE_BOUND, cap_w) for cap_w in H100_CAPS_W]
    return (
        np.array([step.clock * gpu.max_sm_clock_mhz for step in steps]),
        np.array([steps[-1].duration_s / step.duration_s for step in steps]),
    )


def b200_capped(constants: SiliconConstants) -> FloatArray:
    """Share of uncapped throughput at `B200_CAPS_W`, decoding Qwen3-235B-A22B on 8 GPUs with 1,024 sequences."""
    physics = GroupPhysics(find_gpu("B200"), find_model("Qwen3-235B-A22B"), Parallelism(1, 8), constants)
    grid = physics.sweep([1000.0, *B200_CAPS_W], 1024.0, 1024.0 * 700.0)
    return np.asarray(grid.duration_s[0] / grid.duration_s[1:])


def _cap_residuals(gpu: str, c: SiliconConstants) -> FloatArray:
    """Errors on capped measurements: few against hundreds, so tight tolerances give them about as much weight."""
    if gpu == "H100-SXM":
        clocks, share = h100_capped(c)
        by_clock = np.log(clocks / np.array(H100_CLOCKS_MHZ)) / np.array([0.06, *[0.01] * 5])
        return np.concatenate([by_clock, np.log(share / np.array(H100_THROUGHPUT)) / 0.015])
    return np.asarray(np.log(b200_capped(c) / np.array(B200_THROUGHPUT)) / 0.03)


def _residuals(gpu: str, curves: Sequence[Curve]) -> Callable[[SiliconConstants], FloatArray]:
    # The constants must suit families not seen yet, so each family weighs the same, however many rows it has.
    points = {f: sum(len(c.table) for c in curves if c.family == f) for f in {c.family for c in curves}}
    mean_points = sum(points.values()) / max(len(points), 1)
    weight = np.concatenate(
        [np.full(len(c.table), np.sqrt(mean_points / points[c.family])) for c in curves] or [np.empty(0)]
    )

    def residuals(c: SiliconConstants) -> FloatArray:
        served = (weight * robust(log_errors(c, curves) / _TOLERANCE)).reshape(-1) if curves else []
        return np.concatenate([served, _cap_residuals(gpu, c)])

    return residuals


def fit_serving(curves: Sequence[Curve]) -> dict[str, SiliconConstants]:
    """Constants of H100 and B200 by damped Gauss-Newton; a GPU without curves gets the common ones and its cap law."""
    gpus, n = ("H100-SXM", "B200"), len(_FITTED)
    residuals = {gpu: _residuals(gpu, [c for c in curves if c.gpu == gpu]) for gpu in gpus}
    # Fitted are the common constants and then each GPU's deviations; a row of `own` adds up a GPU's constants.
    spread = np.concatenate([np.ones(n), np.tile(_DEVIATION, len(gpus))])
    own = {gpu: np.kron([1.0, *np.eye(len(gpus))[i]], np.eye(n)) for i, gpu in enumerate(gpus)}
    fitted = np.zeros(len(spread))
    for _ in range(_ITERATIONS):
        hessian, gradient = np.diag(1.0 / spread**2), fitted / spread**2
        for gpu in gpus:

            def f(x: FloatArray, gpu: str = gpu) -> FloatArray:
                return residuals[gpu](moved(_START, SPREAD, _FITTED, x))

            x = own[gpu] @ fitted
            r = f(x)
            jacobian = slopes(f, x, r) @ own[gpu]
            hessian += jacobian.T @ jacobian
            gradient += jacobian.T @ r
        move = -np.linalg.solve(hessian, gradient)
        fitted = fitted + move * min(1.0, 1.0 / float(np.abs(move).max()))
    return {gpu: fit_cap_law(gpu, moved(_START, SPREAD, _FITTED, own[gpu] @ fitted)) for gpu in gpus}


def fit_cap_law(gpu: str, serving: SiliconConstants) -> SiliconConstants:
    """Fits the constants of the cap law to the capped measurements alone, keeping the natural draw of decode."""

    def natural(c: SiliconConstants) -> FloatArray:
        physics = GroupPhysics(find_gpu(gpu), find_model("Llama-3.1-8B"), Parallelism(), c)
        return np.log([physics.natural_draw_w(StepWork(decode_seqs=b, kv_tokens=600.0 * b)) for b in (8, 64, 512)])

    before = natural(serving)

    def f(x: FloatArray) -> FloatArray:
        constants = moved(serving, SPREAD, _CAP_LAW, x)
        return np.concatenate([_cap_residuals(gpu, constants), (natural(constants) - before) / 0.02, x])

    return moved(serving, SPREAD, _CAP_LAW, gauss_newton(f, len(_CAP_LAW)))


#: The steps of the virtual V100 compared to GridPilot's kernels: a long prompt, and decoding a small batch.
V100_COMPUTE = StepWork(prefill_tokens=8192, prefill_context_tokens=512)
V100_MEMORY = StepWork(decode_seqs=8, kv_tokens=8 * 512)


def fit_v100(serving: SiliconConstants, e1: Mapping[str, FloatArray]) -> SiliconConstants:
    """V100's power law from E1's compute- and memory-bound kernels; how it serves models is H100's (transferred)."""
    gpu = find_gpu("V100-SXM2")
    works = {"matmul_compute_bound": V100_COMPUTE, "inference_memory_bound": V100_MEMORY}

    def f(x: FloatArray) -> FloatArray:
        physics = GroupPhysics(gpu, find_model("Llama-3.1-8B"), Parallelism(), moved(serving, SPREAD, POWER_LAW, x))
        parts = []
        for kernel, work in works.items():
            points = e1[kernel]
            steps = np.array([physics.locked_step(work, mhz / gpu.max_sm_clock_mhz) for mhz in points[:, 0]])
            parts.append(np.log(steps[:, 1] / points[:, 1]) / 0.03)
            rate = np.log(1.0 / steps[:, 0] / points[:, 2])
            parts.append((rate - rate.mean()) / 0.03)
        # V100 is of another generation, so its power law may deviate from H100's by four times the spread.
        return np.concatenate([*parts, x / 4.0])

    return moved(serving, SPREAD, POWER_LAW, gauss_newton(f, len(POWER_LAW)))


def calibrate(data: Path) -> tuple[dict[str, SiliconConstants], dict[str, str]]:
    """All constants and where they came from."""
    serving = fit_serving(load_mlenergy(data / "mlenergy" / "lm-arena-chat.json"))
    v100 = fit_v100(serving["H100-SXM"], load_gridpilot_e1(data / "gridpilot" / "E1_summary_table.csv"))
    a100 = fit_a100(serving["H100-SXM"], load_mlenergy_v2(data / "mlenergy_v2_a100" / "llm_text_generation.csv"))
    rtx = fit_rtx_pro_6000(serving["H100-SXM"], load_mmbt(data / "mmbt_rtx_pro_6000" / "sweep.csv"))
    mlenergy = "fitted on the ML.ENERGY Benchmark v3 (lm-arena-chat)"
    return (
        {"V100-SXM2": v100, "A100-SXM": a100, **serving, "RTX PRO 6000": rtx},
        {
            "V100-SXM2": "power law fitted on GridPilot E1 (arXiv 2605.26384); serving constants transferred from H100",
            "A100-SXM": "power law and clock-bound latency fitted on FACTS's cells of capped serving (PALS) and the "
            "ML.ENERGY Leaderboard v2; efficiencies and overheads of serving transferred from H100",
            "H100-SXM": f"{mlenergy} and FACTS's cap-to-clock and training tables",
            "B200": f"{mlenergy} and FACTS's capped decode of a 235B MoE",
            "RTX PRO 6000": "fitted on MMBT's sweep of capped vLLM; activations, links and expert imbalance "
            "transferred from H100",
        },
    )


def render(table: Mapping[str, SiliconConstants], provenance: Mapping[str, str]) -> str:
    """The text of `silicon_constants.json`."""
    rows = [
        {"gpu": name, "provenance": provenance[name]}
        | {key: json.loads(f"{value:.4g}") for key, value in asdict(constants).items()}
        for name, constants in table.items()
    ]
    return json.dumps(rows, indent=2) + "\n"


def main(data_folder: Path) -> None:
    """Write the table next to the models, fitted to the data in this folder."""
    target = Path(__file__).parents[1] / "models" / "data" / "silicon_constants.json"
    target.write_text(render(*calibrate(data_folder)))


if __name__ == "__main__":
    typer.run(main)
