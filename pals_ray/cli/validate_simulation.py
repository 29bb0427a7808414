"""`pals validate-simulation`: a short scenario on the real default deployment and in the simulator, side by side."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pals_ray.bench.served_fleet import URL, BenchError, ServedFleet, default_fleet, model_ids, served_fleet
from pals_ray.config.fleet import FleetConfig, parse_fleet_config
from pals_ray.control.telemetry import LATENCY_S
from pals_ray.engine.control_block import ControlBlock, block_path
from pals_ray.evaluation.side_by_side import (
    LIMITS,
    STAGES,
    BudgetStep,
    HeldPoint,
    Member,
    Readings,
    Row,
    Stage,
    Traces,
    figures_of,
    look_times,
    requests_of,
    rows_of,
    simulated,
    summary,
    twin,
)
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.profiling.measure import HeldReplica, held
from pals_ray.profiling.open_loop import OpenLoop
from pals_ray.runtime.client import Fleet
from pals_ray.simulation.setting import SimSetting

#: The budget while replicas are held: room for every GPU at its highest cap.
HELD_BUDGET_W = 1600.0

Replicas = Mapping[str, HeldReplica]


def validate_simulation(
    seconds: Annotated[float, typer.Option(help="How long each point is compared, once settled.", min=5)] = 40.0,
    seed: Annotated[int, typer.Option(help="Of the requests, which both sides get alike.", min=0)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Serve the default fleet for some minutes and simulate the same; exit code 1 where the two differ by too much.

    Live are Ray Serve, vLLM, agents and manager, on virtual GPUs; simulated are all of these but the control code.
    """
    with served_fleet(default_fleet()) as served:
        setting, live = asyncio.run(_live(served, seconds, seed))
    rows = [
        row
        for run in live
        for row in rows_of(run.stage, run.readings, simulated(setting, run.stage, run.traces, run.looks_s))
    ]
    found = summary(rows)
    if as_json:
        print(json.dumps({"seconds": seconds, "seed": seed, **found}, indent=2))
    else:
        _show(rows, seconds, seed)
    if not found["within"]:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class LiveRun:
    """A stage as it went on the live fleet: what was asked of it, and what its counters said at which times."""

    stage: Stage
    traces: Traces
    looks_s: tuple[float, ...]
    readings: list[Readings]


async def _live(served: ServedFleet, seconds: float, seed: int) -> tuple[SimSetting, list[LiveRun]]:
    async with AsyncExitStack() as stack:
        replicas = {m: await stack.enter_async_context(held(m)) for m in model_ids(served.content)}
        config = parse_fleet_config(served.content, "the default fleet")
        setting = await live_setting(served.fleet, served.key, config)
        runs = []
        for number, stage in enumerate(STAGES):
            looks_s = look_times(stage, seconds)
            traces = requests_of(stage, setting.fleet, looks_s[-1], 10 * seed + number)
            runs.append(await run_live(served.fleet, replicas, stage, traces, looks_s))
    return setting, runs


async def live_setting(fleet: Fleet, key: str, config: FleetConfig) -> SimSetting:
    """How to simulate a fleet that serves on one node of this key: its GPUs' dies, its schedulers' limits."""
    dies = {gpu.uuid: gpu.die for gpu in VirtualDriver.attach(key).gpus()}
    members = []
    for row in (await fleet.status_async()).replicas:
        engine = ControlBlock.attach(block_path(key, row.replica_id.partition("#")[2])).scheduler()
        own = tuple(dies.pop(uuid) for uuid in row.gpus)
        members.append(Member(row.model, own, engine.max_batch, engine.step_tokens, engine.kv_tokens))
    return twin(config, members, list(dies.values()))


async def run_live(
    fleet: Fleet, replicas: Replicas, stage: Stage, traces: Traces, looks_s: tuple[float, ...]
) -> LiveRun:
    """One stage on the live fleet, from when nothing runs; where the policy is to decide, from when its telemetry
    reaches back to nothing else."""
    held_at = stage.point if isinstance(stage, HeldPoint) else None
    await fleet.set_budget_async(HELD_BUDGET_W if isinstance(stage, HeldPoint) else stage.before_w)
    for replica in replicas.values():
        await replica.idle()
        if held_at is not None:
            await replica.hold(held_at)
        else:
            await replica.release()
    if held_at is None:
        await asyncio.sleep(LATENCY_S)
    readings: list[Readings] = []
    async with _load(traces) as until:
        for number, look_s in enumerate(looks_s, start=1):
            await until(look_s)
            read = {model: await replica.read() for model, replica in replicas.items()}
            readings.append({model: found.reading for model, found in read.items()})
            for model, replica in replicas.items():
                if held_at is not None and not replica.in_force(read[model]):
                    raise BenchError(f"{model} is held at {held_at}, which is not in force")
            if isinstance(stage, BudgetStep) and number == 2:
                await fleet.set_budget_async(stage.after_w)
    return LiveRun(stage, traces, looks_s, readings)


@asynccontextmanager
async def _load(traces: Traces) -> AsyncIterator[Callable[[float], Awaitable[None]]]:
    """Offer each model its requests; yields what waits until so many s of that have passed. None may fail."""
    async with AsyncExitStack() as stack:
        loads = [await stack.enter_async_context(OpenLoop(URL, model, trace)) for model, trace in traces.items()]
        began_s = time.monotonic()

        async def until(time_s: float) -> None:
            await asyncio.sleep(max(began_s + time_s - time.monotonic(), 0.0))

        try:
            yield until
        finally:
            for load in loads:
                load.abandon()
    if failures := [failure for load in loads for failure in load.result.failures]:
        raise BenchError(f"{len(failures)} requests failed, the first with {failures[0]}")


def _show(rows: list[Row], seconds: float, seed: int) -> None:
    table = Table(title=f"Live / simulated, and the error: {seconds:g} s each, seed {seed}")
    table.add_column("model")
    table.add_column("point")
    for name in ("tokens/s", "W", "ITL p50, ms", "TTFT p50, ms", "live pace"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.model, row.what, *cells(row), f"{row.live.modelled_over_wall:.2f}")
    console = Console()
    console.print(table)
    console.print(
        "live: real Ray Serve, vLLM, agents and manager, with modelled GPUs | simulated: engines, router, messages and "
        "GPUs on a virtual clock, with the same control code | live pace: modelled over real time of the steps; well "
        "under 1 this machine was too busy for the live side"
    )
    for row in (row for row in rows if not row.within):
        limits = ", ".join(f"{name} {limit:.0%}" for name, limit in LIMITS.items())
        console.print(f"beyond the limits ({limits}): {row.model}, {row.what}", highlight=False)


def cells(row: Row) -> list[str]:
    """The figures of a row as its table shows them: both sides, and the error of those that have a limit."""
    live, simulated = figures_of(row.live), figures_of(row.simulated)
    shown = []
    for name, form, unit in (
        ("tokens_per_s", "{:.1f}", 1.0),
        ("power_w", "{:.0f}", 1.0),
        ("itl_p50_s", "{:.0f}", 1e3),
        ("ttft_p50_s", "{:.0f}", 1e3),
    ):
        sides = ("-" if v is None else form.format(unit * v) for v in (live[name], simulated[name]))
        error = row.errors.get(name)
        shown.append(" / ".join(sides) + (f", {error:+.1%}" if error is not None else ""))
    return shown
