"""Small fleets to simulate, and requests for them."""

from __future__ import annotations

import numpy as np

from pals_ray.control.snapshot import Overhead
from pals_ray.models.physics.roofline import Workload
from pals_ray.models.specs import Parallelism
from pals_ray.simulation.setting import SimFleet, SimModel, SimNode, SimSetting
from pals_ray.simulation.simulate import simulate
from pals_ray.simulation.traces import Trace
from policies import pals


def poisson(rate_per_s, duration_s, seed, prompt=256, output=200, spread=True):
    """Poisson arrivals; with `spread` lengths are geometric around their means."""
    rng = np.random.default_rng(seed)
    n = rng.poisson(rate_per_s * duration_s)
    arrival_s = np.sort(rng.uniform(0.0, duration_s, n))
    if not spread:
        return Trace(arrival_s, np.full(n, prompt), np.full(n, output), duration_s)
    return Trace(arrival_s, rng.geometric(1 / prompt, n), rng.geometric(1 / output, n), duration_s)


def served(spec="Llama-3.1-8B", gpu="A100-SXM", tensor=1, **more):
    """A model called `m`."""
    more.setdefault("workload", Workload(256.0, 200.0))
    return SimModel("m", spec, gpu, Parallelism(tensor), **more)


def fleet_setting(
    *models, replicas=2, budget_w=None, policy=pals.allocate, duration_s=60.0, overhead=None, reserve_w=0.0, **more
):
    """One node with `replicas` of each model; the budget is what all at their highest caps take, unless told."""
    models = models or (served(),)
    overhead = overhead or Overhead()
    gpus = sum(model.parallelism.num_gpus for model in models) * replicas
    node = SimNode("n0", models[0].gpu, gpus, tuple(m.name for m in models for _ in range(replicas)), overhead=overhead)
    if budget_w is None:
        budget_w = overhead.charge_w(gpus * models[0].physics.gpu.max_limit_w, gpus, gpus) + reserve_w
    return SimSetting(
        fleet=SimFleet((node,), models, reserve_w=reserve_w),
        budget_w=budget_w,
        policy=policy,
        duration_s=duration_s,
        **more,
    )


def run_fixed(point, requests, duration_s=60.0, replicas=1, seed=0, **model):
    """A run without any controller, at one operating point."""
    setting = fleet_setting(served(fixed=point, **model), replicas=replicas, duration_s=duration_s, seed=seed)
    return simulate(setting, {"m": requests})
