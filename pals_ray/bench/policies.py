"""`pals bench policies`: `uniform` against `pals` under a tight budget, on the real default deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pals_ray.bench.served_fleet import UNCAPPED_BUDGET_W, URL, BenchError, ServedFleet, served_fleet, watch
from pals_ray.config.trace_files import load_trace
from pals_ray.plots.tables import Report, table
from pals_ray.profiling.load import ClosedLoop, OpenLoop, Requests, RequestShape, loaded
from pals_ray.simulation.traces import Trace, clipped, poisson

POLICIES = ("uniform", "pals")
#: Offered output tokens/s, as a share of what each model serves alone and uncapped.
LOAD = {"tiny-dense": 0.95, "tiny-moe": 0.45}
UNCAPPED_S, SETTLE_S = 60.0, 5.0
STREAMS = 32


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a policy: the share of good requests of all models, output tokens per J of the node, mean W."""

    policy: str
    attainment: float
    tokens_per_j: float
    tokens_per_s: float
    mean_w: float
    failures: int


def run(minutes: float, pairs: int, budget_w: float, trace: Path) -> Report:
    """Offer both models the same open-loop load under one budget, divided by either policy in turn."""
    with served_fleet() as served:
        lengths = azure_lengths(served, trace)
        uncapped = asyncio.run(_uncapped(served, lengths, min(UNCAPPED_S, 60.0 * minutes)))
        runs = list(_runs(served, lengths, uncapped, 60.0 * minutes, pairs, budget_w))
    shown = table(
        ("policy", "attainment", "tokens/J", "tokens/s", "mean W", "failed requests"),
        map(_row, (*runs, *(mean_of(runs, policy) for policy in POLICIES))),
        left=("policy",),
        title=f"{pairs} x {minutes:g} min each at {budget_w:g} W for four virtual A100s, open-loop load",
    )
    rates = "uncapped: " + ", ".join(f"{model} {rate:.0f} tok/s" for model, rate in uncapped.items())
    return Report(figures(runs) | {"uncapped_tokens_per_s": uncapped}, shown, rates)


def _row(r: Run) -> tuple[str, ...]:
    watts, failures = f"{r.mean_w:.0f}", str(r.failures)
    return r.policy, f"{r.attainment:.1%}", f"{r.tokens_per_j:.4f}", f"{r.tokens_per_s:.1f}", watts, failures


def mean_of(runs: list[Run], policy: str) -> Run:
    """The means over a policy's runs; failed requests are summed."""
    rows = [asdict(run) for run in runs if run.policy == policy]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0].keys() - {"policy", "failures"}}
    return Run(f"{policy}, mean", **means, failures=sum(row["failures"] for row in rows))


def figures(runs: list[Run]) -> dict[str, float]:
    """The figures of the JSON object: means per policy."""
    means = {policy: mean_of(runs, policy) for policy in POLICIES}
    return {f"{p}_{name}": getattr(m, name) for p, m in means.items() for name in ("attainment", "tokens_per_j")} | {
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
    clients = [OpenLoop(URL, model, trace) for model, trace in loads.items()]
    async with loaded(*clients):
        seen = await watch(served, run_s)
        in_use = (await served.fleet.status_async()).policy
    if in_use != f"policies.{policy}:allocate":
        raise BenchError(f"the fleet used {in_use} in a run of {policy}")
    failures = sum(len(load.result.failures) for load in clients)
    mean_w, tokens_per_s, tokens_per_j = seen.rates()
    if seen.attainment is None:
        raise BenchError(f"no request was judged in a run of {policy}: is the load being served?")
    return Run(policy, seen.attainment, tokens_per_j, tokens_per_s, mean_w, failures)


async def _uncapped(served: ServedFleet, lengths: Trace, for_s: float) -> dict[str, float]:
    """Output tokens/s of each model alone, with a full batch and every cap at its highest."""
    served_by_model = {}
    await served.fleet.set_budget_async(UNCAPPED_BUDGET_W)
    for model in served.model_ids:
        async with loaded(ClosedLoop(URL, model, STREAMS, _drawn(lengths))):
            await asyncio.sleep(SETTLE_S)
            _, served_by_model[model], _ = (await watch(served, for_s)).rates()
    return served_by_model


def _drawn(lengths: Trace) -> Requests:
    """Each slot draws lengths from the trace without end, by a seed of its own."""

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
