"""`pals bench reaction`: how long a new budget takes to be in force on every GPU."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import numpy as np
import ray

from pals_ray.engine.control_block import ControlBlock, block_path
from pals_ray.errors import PalsError
from pals_ray.gpus.driver_choice import HardwareSpec
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.gpus.virtual_block import remove_block
from pals_ray.plots.tables import Report, table
from pals_ray.processes import identify
from pals_ray.runtime.actors import ensure_agent, ensure_manager
from pals_ray.runtime.client import Fleet
from pals_ray.runtime.messages import NAMESPACE, AgentSpec

CALL_DELAY_S = 0.02
GPU = "A100-SXM"
MODEL = "sleeper"


#: A change of the budget, W, and the time from the call until every cap was in force and read back, ms.
Step = tuple[float, float]


def run(agents: int, steps: int) -> Report:
    """Time budget changes on a fleet of so many agents beside processes that only sleep."""
    with sleeping_fleet(agents) as (fleet, driver):
        done = change_budgets(fleet, driver, steps)
    cuts, raises = [ms for change_w, ms in done if change_w < 0], [ms for change_w, ms in done if change_w >= 0]
    rows = []
    for name, chosen in (("cuts", cuts), ("raises", raises), ("all", cuts + raises)):
        if chosen:
            ms = np.percentile(chosen, [50, 99, 100])
            rows.append((name, str(len(chosen)), *(f"{x:.0f}" for x in ms)))
    title = f"From set_budget to every cap in force: {agents} agents, {CALL_DELAY_S * 1000:g} ms a GPU call"
    headers = ("changes", "count", "ms p50", "ms p99", "ms worst")
    return Report(figures(done), table(headers, rows, left=("changes",), title=title))


def figures(steps: list[Step]) -> dict[str, float]:
    """The figures of the JSON object, over cuts and raises together."""
    p50_ms, p99_ms = np.percentile([ms for _, ms in steps], [50, 99])
    return {"p50_ms": float(p50_ms), "p99_ms": float(p99_ms), "steps": len(steps)}


def change_budgets(fleet: Fleet, driver: VirtualDriver, steps: int) -> list[Step]:
    """Set random budgets one after another, at random times between the agents' beats."""
    gpus, rng, done = driver.gpus(), random.Random(1), []
    low_w, high_w = (sum(getattr(gpu.info, name) for gpu in gpus) for name in ("min_limit_w", "max_limit_w"))
    before_w = fleet.status().budget_w
    for _ in range(steps):
        budget_w = round(rng.uniform(1.05 * low_w, 0.95 * high_w))
        time.sleep(rng.uniform(0.2, 0.7))
        called_s = time.perf_counter()
        fleet.set_budget(budget_w)
        done.append((budget_w - before_w, 1000 * (time.perf_counter() - called_s)))
        in_force_w = sum(gpu.limit_w() for gpu in gpus)
        if not budget_w - 1 < in_force_w < budget_w + 0.01:
            raise PalsError(
                f"set_budget({budget_w}) returned with {in_force_w:.1f} W in force; the figures say nothing"
            )
        before_w = budget_w
    return done


@contextmanager
def sleeping_fleet(agents: int) -> Iterator[tuple[Fleet, VirtualDriver]]:
    """A fleet of its own on a Ray of its own: real manager and agents, GPUs that are slow to answer, no engine."""
    key = f"bench-{os.getpid()}"
    sleepers: list[subprocess.Popen[bytes]] = []
    # Ray prints warnings about its cluster to stdout, which is for the figures.
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="pals-bench-") as storage:
        ray.init(address="local", num_cpus=2, namespace=NAMESPACE, include_dashboard=False, log_to_driver=False)
        try:
            driver = VirtualDriver.open(key, GPU, agents)
            fleet = asyncio.run(_start(key, storage, agents, sleepers))
            for gpu in driver.gpus():
                gpu.call_delay_s = CALL_DELAY_S
            yield fleet, driver
            for gpu in driver.gpus():
                gpu.call_delay_s = 0.0
            for sleeper in sleepers:
                sleeper.kill()
            fleet.stop()
        finally:
            for sleeper in sleepers:
                sleeper.kill()
                sleeper.wait()
            ray.shutdown()
            remove_block(key)


async def _start(key: str, storage: str, agents: int, sleepers: list[subprocess.Popen[bytes]]) -> Fleet:
    manager = await ensure_manager(storage)
    content = {
        "budget_w": 200.0 * agents,
        # No requests come to these replicas: their agents would stay at the lowest cap if the policy did not pin caps.
        "policy": "policies.batch_only:allocate",
        "hardware": {"kind": "virtual", "virtual": {"gpu": GPU, "count": agents}},
        "storage_path": storage,
        "models": [{"llm_config": {"model_loading_config": {"model_id": MODEL}}, "stands_for": "Qwen3-32B"}],
    }
    await manager.configure.remote(content, "1", "")
    specs = []
    for index in range(agents):
        sleepers.append(subprocess.Popen(["sleep", "infinity"]))
        specs.append(_spec(key, storage, index, agents, sleepers[-1].pid))
    found = await asyncio.gather(*map(ensure_agent, specs))
    await asyncio.gather(*(agent.claim.remote([f"GPU-virtual-{key}-{index}"], 32) for index, agent in enumerate(found)))
    return Fleet()


def _spec(key: str, storage: str, index: int, agents: int, pid: int) -> AgentSpec:
    """A replica whose process only sleeps, with a control block of its own."""
    name = f"r{index}"
    block = ControlBlock.create(block_path(key, name))
    owner = identify(pid)
    block.field("owner_pid")[0], block.field("owner_start_ticks")[0] = owner
    return AgentSpec(
        replica_id=f"{MODEL}#{name}",
        model=MODEL,
        num_gpus=1,
        node_id=ray.get_runtime_context().get_node_id(),
        node_key=key,
        node_labels=(),
        replica=owner,
        block_path=str(block.path),
        hardware=HardwareSpec("virtual", GPU, agents),
        storage_path=storage,
    )
