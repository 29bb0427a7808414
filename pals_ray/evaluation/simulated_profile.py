"""What controllers know of a replica beforehand: a surface fitted to a profile, as `pals profile` makes one live."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from pals_ray.config.scenario import LoadSpec
from pals_ray.evaluation.cases import SATURATION, requests_for
from pals_ray.models.fitting.fitted_surface import fit_surface
from pals_ray.models.fitting.sample_checks import SampleTable
from pals_ray.models.grid import GridModel
from pals_ray.models.physics.roofline import RooflineModel
from pals_ray.models.power_model import PowerModel
from pals_ray.models.specs import find_gpu, find_model
from pals_ray.simulation.setting import SimFleet, SimModel, SimNode, SimSetting
from pals_ray.simulation.simulate import simulate
from pals_ray.simulation.traces import Trace
from pals_ray.types import OperatingPoint, Target
from policies import uniform

#: The points: these shares of the device's range of caps, each at these shares of the start batch. The lowest cap is
#: among them: far below a large batch's draw capacity falls faster than any form fitted above it says.
CAP_SHARES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0)
BATCH_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
#: How long each point runs, and how much of that is left out while the engine fills, s. No scenario uses this seed.
POINT_S, FILL_S = 180.0, 60.0
_SEED = 7_000_000


def roofline(model: SimModel) -> RooflineModel:
    """The roofline of a model at its engine's start values: true but for queueing, dies and the spread of lengths."""
    return RooflineModel(model.physics, model.workload, step_tokens=model.step_tokens)


def full_tokens_per_s(model: SimModel, point: OperatingPoint) -> float:
    """Output tokens/s of one replica with a full batch at a point, by the roofline."""
    return float(roofline(model).predict(point.cap_w, point.batch_limit).throughput_tokens_per_s)


def prompt_share(model: SimModel, point: OperatingPoint) -> float:
    """Share of a full engine's time that prompts take, by the roofline: twice what half as long ones would save."""
    work = model.workload
    shorter = replace(model, workload=replace(work, prompt_tokens=work.prompt_tokens / 2.0))
    whole, half = full_tokens_per_s(model, point), full_tokens_per_s(shorter, point)
    return min(max(2.0 * (1.0 - whole / half), 0.0), 1.0)


@lru_cache(maxsize=16)
def profiled(model: SimModel, lengths: Trace) -> PowerModel:
    """Measure one replica at fixed points under requests that never run out, of the lengths to come, and fit.

    TTFT is taken from the roofline: under such a load it would be the wait in the queue.
    """
    gpu = find_gpu(model.gpu)
    span_w = gpu.max_limit_w - gpu.min_limit_w
    points = [
        OperatingPoint(round(gpu.min_limit_w + share * span_w), max(round(part * model.max_batch), 1))
        for share in CAP_SHARES
        for part in BATCH_SHARES
    ]
    rows = [_measured(model, lengths, point) for point in points]
    rate, power_w, itl_p50_s, itl_p99_s = (np.array(column) for column in zip(*rows, strict=True))
    table = SampleTable(
        np.array([point.cap_w for point in points]),
        np.array([float(point.batch_limit) for point in points]),
        rate,
        power_w,
        model.parallelism.num_gpus,
        {"itl_p50_s": itl_p50_s, "itl_p99_s": itl_p99_s},
    )
    fitted = fit_surface(table, find_model(model.spec), roofline(model))
    return GridModel(fitted, gpu.min_limit_w, gpu.max_limit_w, model.max_batch)


def _measured(model: SimModel, lengths: Trace, point: OperatingPoint) -> tuple[float, float, float, float]:
    """(tokens/s, W of all GPUs, ITL p50, ITL p99) of one replica at a point."""
    gpus = model.parallelism.num_gpus
    alone = replace(model, fixed=point, target=Target())
    node = SimNode("profile", model.gpu, gpus, (model.name,))
    rate = SATURATION * full_tokens_per_s(model, point) / float(lengths.output_tokens.mean())
    offered = requests_for(LoadSpec(ramp_s=0.0), "poisson", lengths, rate, POINT_S, _SEED)
    budget_w = gpus * find_gpu(model.gpu).max_limit_w
    setting = SimSetting(SimFleet((node,), (alone,)), budget_w, uniform.allocate, POINT_S)
    result = simulate(setting, {model.name: offered})
    counted = result.time_s > FILL_S
    (replica,), found = result.replicas, result.models[model.name]
    return (
        float(np.mean(replica.tokens_per_s[counted])),
        float(np.mean(replica.power_w[counted])),
        found.itl_s(0.5) or np.nan,
        found.itl_s(0.99) or np.nan,
    )
