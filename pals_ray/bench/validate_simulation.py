"""`pals validate-simulation`: a short scenario on the real default deployment and in the simulator, side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack

from pals_ray.bench.served_fleet import UNCAPPED_BUDGET_W, URL, BenchError, ServedFleet, served_fleet
from pals_ray.config.fleet import FleetConfig, parse_fleet_config
from pals_ray.engine.control_block import ControlBlock, block_path
from pals_ray.evaluation import side_by_side
from pals_ray.evaluation.side_by_side import BudgetStep, HeldPoint, Readings, Row, Stage, Traces
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.plots.tables import Report, table
from pals_ray.profiling.load import OpenLoop, loaded
from pals_ray.profiling.measure import HeldReplica, held
from pals_ray.runtime.client import Fleet
from pals_ray.simulation.setting import SimSetting

#: Engines that have just started stall for seconds in their first minute under load: a load that nobody looks at, s.
WARM_S = 60.0
#: The format of each figure, and its factor from SI units.
_SHOWN_AS = {
    "tokens_per_s": (".1f", 1),
    "power_w": (".0f", 1),
    "itl_p50_s": (".0f", 1e3),
    "tpot_p50_s": (".0f", 1e3),
    "ttft_p50_s": (".0f", 1e3),
}


def run(seconds: float, seed: int) -> Report:
    """Serve the default fleet for some minutes and simulate the same. The figures say whether both agree (`within`)."""
    with served_fleet() as served:
        setting, live = asyncio.run(_live(served, seconds, seed))
    rows = []
    for stage, traces, looks_s, readings in live:
        rows += side_by_side.rows_of(stage, readings, side_by_side.simulated(setting, stage, traces, looks_s))
    shown = table(
        ("model", "point", "tokens/s", "W", "ITL p50, ms", "TPOT p50, ms", "TTFT p50, ms", "live pace"),
        ((row["model"], row["what"], *cells(row), f"{row['modelled_over_wall']:.2f}") for row in rows),
        left=("model", "point"),
        title=f"Live / simulated, and the error: {seconds:g} s each, seed {seed}",
    )
    legend = (
        "live: real Ray Serve, vLLM, agents and manager, with modelled GPUs | simulated: engines, router, messages and "
        "GPUs on a virtual clock, with the same control code | live pace: modelled over real time of the steps; well "
        "under 1 this machine was too busy for the live side"
    )
    limits = ", ".join(f"{name} {limit:.0%}" for name, limit in side_by_side.LIMITS.items())
    beyond = (
        f"beyond the limits ({limits}): {row['model']}, {row['what']}" for row in rows if not side_by_side.within(row)
    )
    found = side_by_side.summary(rows)
    live_share, simulated_share = found["live_attainment"], found["simulated_attainment"]
    judged = (
        f"attainment over all points: {live_share:.1%} live, {simulated_share:.1%} simulated (at most "
        f"{side_by_side.ATTAINMENT_LIMIT:.0%} apart)"
    )
    return Report({"seconds": seconds, "seed": seed, **found}, shown, judged, legend, *beyond)


#: A stage as it went on the live fleet: what was asked of it, and what its counters said at which times, s.
LiveRun = tuple[Stage, Traces, tuple[float, ...], list[Readings]]


async def _live(served: ServedFleet, seconds: float, seed: int) -> tuple[SimSetting, list[LiveRun]]:
    async with AsyncExitStack() as stack:
        replicas = {m: await stack.enter_async_context(held(m)) for m in served.model_ids}
        config = parse_fleet_config(served.content, "the default fleet")
        setting = await live_setting(served.fleet, served.key, config)
        warm = side_by_side.STAGES[0]
        requests = side_by_side.requests_of(warm, setting.fleet, WARM_S, seed)
        await run_live(served.fleet, replicas, warm, requests, (WARM_S,))
        runs = []
        for number, stage in enumerate(side_by_side.STAGES):
            looks_s = side_by_side.look_times(stage, seconds)
            traces = side_by_side.requests_of(stage, setting.fleet, looks_s[-1], 10 * seed + number)
            readings = await run_live(served.fleet, replicas, stage, traces, looks_s)
            runs.append((stage, traces, looks_s, readings))
    return setting, runs


async def live_setting(fleet: Fleet, key: str, config: FleetConfig) -> SimSetting:
    """How to simulate a fleet that serves on one node of this key: its GPUs' dies, its schedulers' limits."""
    dies = {gpu.uuid: gpu.die for gpu in VirtualDriver.attach(key).gpus()}
    members = []
    for row in (await fleet.status_async()).replicas:
        scheduler = ControlBlock.attach(block_path(key, row.replica_id.partition("#")[2])).scheduler()
        members.append((row.model, tuple(dies.pop(uuid) for uuid in row.gpus), scheduler))
    return side_by_side.twin(config, members, list(dies.values()))


async def run_live(
    fleet: Fleet, replicas: Mapping[str, HeldReplica], stage: Stage, traces: Traces, looks_s: tuple[float, ...]
) -> list[Readings]:
    """Run one stage on the live fleet once it is idle."""
    held_at = stage.point if isinstance(stage, HeldPoint) else None
    await fleet.set_budget_async(UNCAPPED_BUDGET_W if isinstance(stage, HeldPoint) else stage.before_w)
    for replica in replicas.values():
        await replica.idle()
        if held_at is not None:
            await replica.hold(held_at)
        else:
            await replica.release()
    readings: list[Readings] = []
    clients = [OpenLoop(URL, model, trace) for model, trace in traces.items()]
    async with loaded(*clients):
        began_s = time.monotonic()
        for number, look_s in enumerate(looks_s, start=1):
            await asyncio.sleep(max(began_s + look_s - time.monotonic(), 0.0))
            read = {model: await replica.read() for model, replica in replicas.items()}
            readings.append({model: found.reading for model, found in read.items()})
            for model, replica in replicas.items():
                if held_at is not None and not replica.in_force(read[model]):
                    raise BenchError(f"{model} is held at {held_at}, which is not in force")
            if isinstance(stage, BudgetStep) and number == 2:
                await fleet.set_budget_async(stage.after_w)
    if failures := [failure for client in clients for failure in client.result.failures]:
        raise BenchError(f"{len(failures)} requests failed, the first with {failures[0]}")
    return readings


def cells(row: Row) -> list[str]:
    """The figures of a row as its table shows them: both sides, and the error of those that have a limit."""
    shown = []
    for name, (form, factor) in _SHOWN_AS.items():
        sides = ("-" if v is None else format(factor * v, form) for v in (row["live"][name], row["simulated"][name]))
        error = row["errors"].get(name)
        shown.append(" / ".join(sides) + (f", {error:+.1%}" if error is not None else ""))
    return shown
