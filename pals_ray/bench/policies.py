"""`pals bench policies`: a baseline against `pals` under one budget, on the real default deployment."""

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

#: Offered output tokens/s, as a share of what each model serves alone and uncapped, unless one share is asked for.
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


def run(minutes: float, pairs: int, budget_w: float, trace: Path, baseline: str, load: float | None) -> Report:
    """Offer both models the same open-loop load under one budget, divided by either policy in turn."""
    shares = LOAD if load is None else dict.fromkeys(LOAD, load)
    with served_fleet() as served:
        lengths = azure_lengths(served, trace)
        uncapped = asyncio.run(_uncapped(served, lengths, min(UNCAPPED_S, 60.0 * minutes)))
        offered = {model: shares[model] * rate for model, rate in uncapped.items()}
        runs = list(_runs(served, lengths, offered, 60.0 * minutes, pairs, budget_w, (baseline, "pals")))
    shown = table(
        ("policy", "attainment", "tokens/J", "tokens/s", "mean W", "failed requests"),
        map(_row, (*runs, *(mean_of(runs, policy) for policy in (baseline, "pals")))),
        left=("policy",),
        title=f"{pairs} x {minutes:g} min each at {budget_w:g} W for four virtual A100s, open-loop load",
    )
    rates = "uncapped: " + ", ".join(f"{model} {rate:.0f} tok/s" for model, rate in uncapped.items())
    said = figures(runs, baseline)
    saved = f"pals draws {said['saving']:.1%} less than {baseline}"
    return Report(said | {"uncapped_tokens_per_s": uncapped}, shown, rates, saved)


def _row(r: Run) -> tuple[str, ...]:
    watts, failures = f"{r.mean_w:.0f}", str(r.failures)
    return r.policy, f"{r.attainment:.1%}", f"{r.tokens_per_j:.4f}", f"{r.tokens_per_s:.1f}", watts, failures


def mean_of(runs: list[Run], policy: str) -> Run:
    """The means over a policy's runs; failed requests are summed."""
    rows = [asdict(run) for run in runs if run.policy == policy]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0].keys() - {"policy", "failures"}}
    return Run(f"{policy}, mean", **means, failures=sum(row["failures"] for row in rows))


def figures(runs: list[Run], baseline: str) -> dict[str, float]:
    """The figures of the JSON object: means per policy, and how much less `pals` draws."""
    means = {policy: mean_of(runs, policy) for policy in (baseline, "pals")}
    names = ("attainment", "tokens_per_j", "mean_w")
    return {f"{policy}_{name}": getattr(mean, name) for policy, mean in means.items() for name in names} | {
        "saving": 1.0 - means["pals"].mean_w / means[baseline].mean_w,
        "failures": float(sum(run.failures for run in runs)),
    }


def _runs(
    served: ServedFleet,
    lengths: Trace,
    offered_tokens_per_s: dict[str, float],
    run_s: float,
    pairs: int,
    budget_w: float,
    policies: tuple[str, str],
) -> Iterator[Run]:
    for pair in range(pairs):
        # The same requests for both; which policy goes first alternates.
        loads = {
            model: poisson(lengths, rate / float(lengths.output_tokens.mean()), run_s, seed=pair)
            for model, rate in offered_tokens_per_s.items()
        }
        for policy in policies if pair % 2 == 0 else reversed(policies):
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
