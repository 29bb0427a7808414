"""`pals bench simulation`: what the simulator itself costs on one core."""

from __future__ import annotations

import resource
import time

import numpy as np

from pals_ray.models.physics.roofline import Workload
from pals_ray.plots.tables import Report, table
from pals_ray.simulation.setting import SimFleet, SimModel, SimNode, SimSetting
from pals_ray.simulation.simulate import simulate
from pals_ray.simulation.traces import Trace
from policies import pals

#: (GPUs, simulated s) and the most that may take, s.
CASES = ((12, 3600.0, 60.0), (1000, 600.0, 900.0))
REQUESTS_PER_GPU_S = 4.0
PROMPT_TOKENS, OUTPUT_TOKENS = 1155, 211
BUDGET_PER_GPU_W = 300.0


#: Each figure of a case, its column's head and its format. `cpu_s` is of this process for `simulated_s` of the GPUs,
#: `whole_cpu_s` for the whole of the case at that pace, `memory_mb` the process's peak so far.
COLUMNS = {
    "gpus": ("GPUs", "{}"),
    "simulated_s": ("simulated", "{:.0f} s"),
    "cpu_s": ("CPU", "{:.1f} s"),
    "whole_cpu_s": ("whole case", "{:.0f} s"),
    "most_s": ("at most", "{:.0f} s"),
    "requests": ("requests", "{}"),
    "memory_mb": ("memory", "{:.0f} MB"),
}


def measure(gpus: int, whole_s: float, most_s: float, part: float) -> dict[str, float]:
    """Simulate a part of a case: Llama-3.1-8B on every A100, Poisson arrivals, the pals policy on a tight budget."""
    duration_s = part * whole_s
    rng = np.random.default_rng(1)
    count = int(REQUESTS_PER_GPU_S * gpus * duration_s)
    requests = Trace(
        np.sort(rng.uniform(0.0, duration_s, count)),
        rng.geometric(1 / PROMPT_TOKENS, count),
        rng.geometric(1 / OUTPUT_TOKENS, count),
        duration_s,
    )
    workload = Workload(float(PROMPT_TOKENS), float(OUTPUT_TOKENS))
    model = SimModel("llama", "Llama-3.1-8B", "A100-SXM", step_tokens=2048, workload=workload)
    nodes = tuple(SimNode(f"node{i}", "A100-SXM", 4, ("llama",) * 4) for i in range(gpus // 4))
    setting = SimSetting(SimFleet(nodes, (model,)), BUDGET_PER_GPU_W * gpus, pals.allocate, duration_s)
    start_s = time.process_time()
    simulate(setting, {"llama": requests})
    cpu_s = time.process_time() - start_s
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    values = (gpus, duration_s, cpu_s, cpu_s / part, most_s, count, memory_mb)
    return dict(zip(COLUMNS, values, strict=True))


def run(part: float) -> Report:
    """Simulate this share of each case."""
    costs = [measure(*case, part) for case in CASES]
    headers = [head for head, _ in COLUMNS.values()]
    rows = ([form.format(cost[name]) for name, (_, form) in COLUMNS.items()] for cost in costs)
    return Report(costs, table(headers, rows, left=headers))
