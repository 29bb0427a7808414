"""`pals bench policies`: `uniform` against `pals` under a tight budget, on the real default deployment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from pals_ray.bench.served_fleet import (
    URL,
    BenchError,
    ServedFleet,
    Watch,
    default_fleet,
    model_ids,
    served_fleet,
    watch,
)
from pals_ray.config.trace_files import load_trace
from pals_ray.profiling.load import ClosedLoop, Requests, RequestShape
from pals_ray.profiling.open_loop import OpenLoop
from pals_ray.simulation.traces import Trace, clipped, poisson

POLICIES = ("uniform", "pals")
BUDGET_W = 600.0
#: Offered output tokens/s, as a share of what each model serves by itself where nothing caps it.
LOAD = {"tiny-dense": 0.95, "tiny-moe": 0.45}
UNCAPPED_S, SETTLE_S = 60.0, 5.0
STREAMS = 32
AZURE = Path("../shared/data/azure_llm_2023/AzureLLMInferenceTrace_conv.csv")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a policy: shares of violations in judged intervals, output tokens per J of the node, mean W."""

    policy: str
    violations: float
    tokens_per_j: float
    tokens_per_s: float
    mean_w: float
    failures: int


def policies(
    minutes: Annotated[float, typer.Option(help="How long each run lasts.")] = 5.0,
    pairs: Annotated[int, typer.Option(help="Runs of each policy, alternating.")] = 3,
    budget_w: Annotated[float, typer.Option("--budget", help="Watts for the four GPUs.")] = BUDGET_W,
    trace: Annotated[Path, typer.Option(help="Azure's LLM inference trace: lengths are drawn from it.")] = AZURE,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Offer both models the same open-loop load under one budget, divided by either policy in turn."""
    content = default_fleet()
    with served_fleet(content) as served:
        lengths = azure_lengths(served, trace)
        uncapped = asyncio.run(_uncapped(served, lengths, min(UNCAPPED_S, 60.0 * minutes)))
        runs = list(_runs(served, lengths, uncapped, 60.0 * minutes, pairs, budget_w))
    if as_json:
        print(json.dumps(figures(runs) | {"uncapped_tokens_per_s": uncapped}))
        return
    table = Table(title=f"{pairs} x {minutes:g} min each at {budget_w:g} W for four virtual A100s, open-loop load")
    for header in ("policy", "violations", "tokens/J", "tokens/s", "mean W", "failed requests"):
        table.add_column(header, justify="left" if header == "policy" else "right")
    for run in (*runs, *(mean_of(runs, policy) for policy in POLICIES)):
        table.add_row(
            run.policy,
            f"{run.violations:.1%}",
            f"{run.tokens_per_j:.4f}",
            f"{run.tokens_per_s:.1f}",
            f"{run.mean_w:.0f}",
            str(run.failures),
        )
    console = Console()
    console.print(table)
    console.print("uncapped: " + ", ".join(f"{model} {rate:.0f} tok/s" for model, rate in uncapped.items()))


def mean_of(runs: list[Run], policy: str) -> Run:
    """The means over a policy's runs; failed requests are summed."""
    rows = [run for run in runs if run.policy == policy]

    def mean(name: str) -> float:
        return float(np.mean([getattr(run, name) for run in rows]))

    failures = sum(run.failures for run in rows)
    names = ("violations", "tokens_per_j", "tokens_per_s", "mean_w")
    return Run(f"{policy}, mean", **{name: mean(name) for name in names}, failures=failures)


def figures(runs: list[Run]) -> dict[str, float]:
    """The figures of the JSON object: means per policy."""
    means = {policy: mean_of(runs, policy) for policy in POLICIES}
    return {f"{p}_{name}": getattr(m, name) for p, m in means.items() for name in ("violations", "tokens_per_j")} | {
        "failures": float(sum(run.failures for run in runs))
    }


def _runs(
    served: ServedFleet, lengths: Trace, uncapped: dict[str, float], run_s: float, pairs: int, budget_w: float
) -> Iterator[Run]:
    for pair in range(pairs):
        # The same requests for both; which policy goes first alternates.
        loads = {
            model: poisson(lengths, LOAD[model] * rate / float(lengths.output_tokens.mean()), run_s, seed=pair)
            for model, rate in uncapped.items()
        }
        for policy in POLICIES if pair % 2 == 0 else reversed(POLICIES):
            served.redeploy(budget_w=budget_w, policy=f"policies.{policy}:allocate")
            yield asyncio.run(_run(served, policy, loads, run_s))


async def _run(served: ServedFleet, policy: str, loads: dict[str, Trace], run_s: float) -> Run:
    await asyncio.sleep(SETTLE_S)
    async with AsyncExitStack() as stack:
        results = [await stack.enter_async_context(OpenLoop(URL, m, trace)) for m, trace in loads.items()]
        seen = await watch(served, run_s)
        for load in results:
            load.abandon()
        in_use = (await served.fleet.status_async()).policy
    if in_use != f"policies.{policy}:allocate":
        raise BenchError(f"the fleet used {in_use} in a run of {policy}")
    failures = sum(len(load.result.failures) for load in results)
    return Run(policy, seen.violation_share, seen.tokens_per_j, seen.tokens_per_s, seen.mean_w, failures)


async def _uncapped(served: ServedFleet, lengths: Trace, for_s: float) -> dict[str, float]:
    """Output tokens/s of each model by itself, as many streams as it takes at once, every cap at its highest."""
    served_by_model = {}
    await served.fleet.set_budget_async(1600.0)
    for model in model_ids(served.content):
        async with ClosedLoop(URL, model, STREAMS, _drawn(lengths)) as load:
            await asyncio.sleep(SETTLE_S)
            seen: Watch = await watch(served, for_s)
            load.abandon()
        served_by_model[model] = seen.tokens_per_s
    return served_by_model


def _drawn(lengths: Trace) -> Requests:
    """For each slot its own endless draw of the trace's lengths."""

    def requests(slot: int) -> Iterator[RequestShape]:
        rng = np.random.default_rng(slot)
        while True:
            at = int(rng.integers(len(lengths)))
            yield RequestShape(int(lengths.prompt_tokens[at]), int(lengths.output_tokens[at]))

    return requests


def azure_lengths(served: ServedFleet, trace: Path) -> Trace:
    """A trace whose prompt and output lengths are clipped to what the models take."""
    longest = min(model["llm_config"]["engine_kwargs"]["max_model_len"] for model in served.content["models"])
    return clipped(load_trace(trace, "azure"), longest)
