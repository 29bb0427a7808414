"""`pals bench simulation`: what the simulator itself costs on one core."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from pals_ray.models.physics.roofline import Workload
from pals_ray.simulation.setting import ConstantBudget, Requests, SimFleet, SimModel, SimNode, SimSetting
from pals_ray.simulation.simulate import simulate
from policies import pals

#: (GPUs, simulated s) and the most that may take, s.
CASES = ((12, 3600.0, 60.0), (1000, 600.0, 900.0))
REQUESTS_PER_GPU_S = 4.0
PROMPT_TOKENS, OUTPUT_TOKENS = 1155, 211
BUDGET_PER_GPU_W = 300.0


@dataclass(frozen=True, slots=True)
class Cost:
    """One case: CPU s of this process for `simulated_s` of `gpus` GPUs, and for the whole of the case at that pace.

    `memory_mb` is the process's peak so far.
    """

    gpus: int
    simulated_s: float
    cpu_s: float
    whole_cpu_s: float
    most_s: float
    requests: int
    memory_mb: float


def measure(gpus: int, whole_s: float, most_s: float, part: float) -> Cost:
    """Simulate a part of a case: Llama-3.1-8B on every A100, Poisson arrivals, the pals policy on a tight budget."""
    duration_s = part * whole_s
    rng = np.random.default_rng(1)
    count = int(REQUESTS_PER_GPU_S * gpus * duration_s)
    requests = Requests(
        np.sort(rng.uniform(0.0, duration_s, count)),
        rng.geometric(1 / PROMPT_TOKENS, count),
        rng.geometric(1 / OUTPUT_TOKENS, count),
    )
    workload = Workload(float(PROMPT_TOKENS), float(OUTPUT_TOKENS))
    model = SimModel("llama", "Llama-3.1-8B", "A100-SXM", step_tokens=2048, workload=workload)
    nodes = tuple(SimNode(f"node{i}", "A100-SXM", 4, ("llama",) * 4) for i in range(gpus // 4))
    budget = ConstantBudget(BUDGET_PER_GPU_W * gpus)
    setting = SimSetting(SimFleet(nodes, (model,)), budget, pals.allocate, duration_s)
    start_s = time.process_time()
    simulate(setting, {"llama": requests})
    cpu_s = time.process_time() - start_s
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Cost(gpus, duration_s, cpu_s, cpu_s / part, most_s, count, memory_mb)


def simulation(
    part: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of each case to simulate.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """How long an hour of 12 GPUs and ten minutes of 1,000 GPUs take on one core, and how much memory."""
    costs = [measure(*case, part) for case in CASES]
    if as_json:
        print(json.dumps([asdict(cost) for cost in costs]))
        return
    table = Table("GPUs", "simulated", "CPU", "whole case", "at most", "requests", "memory")
    for c in costs:
        table.add_row(
            f"{c.gpus}",
            f"{c.simulated_s:.0f} s",
            f"{c.cpu_s:.1f} s",
            f"{c.whole_cpu_s:.0f} s",
            f"{c.most_s:.0f} s",
            f"{c.requests}",
            f"{c.memory_mb:.0f} MB",
        )
    Console().print(table)
