"""`pals bench`: measure what pals-ray itself costs and gains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pals_ray.bench import allocator, evaluation, models, overhead, policies, reaction, regulation, simulation
from pals_ray.cli.options import AsJson, Jobs, SampleTrace

app = typer.Typer(help="Measure what pals-ray itself costs and gains.")


@app.command("allocator")
def _allocator(as_json: AsJson = False) -> None:
    """Time the division of a budget over 100 to 10,000 replicas, and measure its distance from the optimum."""
    allocator.run().print(as_json)


@app.command("evaluation")
def _evaluation(
    out: Annotated[Path, typer.Option(help="Folder that keeps every case; what is there is not run again.")] = Path(
        "build/bench"
    ),
    docs: Annotated[Path, typer.Option(help="Folder of the docs to update.")] = Path("docs"),
    scenario: Annotated[list[str] | None, typer.Option(help="Only this one, by name or path (repeatable).")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds; default: each scenario's.")] = None,
    jobs: Jobs = None,
    sample_trace: SampleTrace = False,
) -> None:
    """Run every scenario and write docs/evaluation.md; begun again, it goes on where it was."""
    page = evaluation.run(scenario or evaluation.SCENARIOS, out, docs, jobs, sample_trace, seeds)
    typer.echo(f"written: {page}; pages with every case: {out}/*/report.html")


app.command("models")(models.models)


@app.command("overhead")
def _overhead(
    pairs: Annotated[int, typer.Option(help="Runs of each side, alternating.")] = 12,
    seconds: Annotated[float, typer.Option(help="How long each run lasts.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Compare an engine under pals-ray, unpaced, with plain ray.serve.llm; and time the scheduler's hook."""
    overhead.run(pairs, seconds).print(as_json)


@app.command("policies")
def _policies(
    minutes: Annotated[float, typer.Option(help="How long each run lasts.")] = 5.0,
    pairs: Annotated[int, typer.Option(help="Runs of each policy, alternating.")] = 3,
    budget_w: Annotated[float, typer.Option("--budget", help="Watts for the four GPUs.")] = 600.0,
    baseline: Annotated[str, typer.Option(help="The policy to compare with.")] = "uniform",
    load: Annotated[
        float | None, typer.Option(help="Share of what each model serves uncapped; default: tight at 600 W.", min=0.01)
    ] = None,
    trace: Annotated[Path, typer.Option(help="Azure's LLM inference trace: lengths are drawn from it.")] = Path(
        "../shared/data/azure_llm_2023/AzureLLMInferenceTrace_conv.csv"
    ),
    as_json: AsJson = False,
) -> None:
    """Offer both models the same open-loop load under one budget, divided by either policy in turn."""
    policies.run(minutes, pairs, budget_w, trace, baseline, load).print(as_json)


@app.command("reaction")
def _reaction(
    as_json: AsJson = False,
    agents: Annotated[int, typer.Option(help="Replicas, each with an agent and a GPU of its own.")] = 16,
    steps: Annotated[int, typer.Option(help="Changes of the budget.")] = 50,
) -> None:
    """Time budget changes on real Ray: agents beside processes that only sleep, virtual NVML taking 20 ms a call."""
    reaction.run(agents, steps).print(as_json)


@app.command("regulation")
def _regulation(
    minutes: Annotated[float, typer.Option(help="How long the signal is followed; a score needs 10 at least.")] = 20.0,
    plot: Annotated[Path, typer.Option(help="Measured draw against the target, as PNG.")] = Path("regulation.png"),
    seed: Annotated[int, typer.Option(help="Of the synthetic signal.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Load the default fleet in full and have it follow a synthetic signal (an Ornstein-Uhlenbeck process)."""
    regulation.run(minutes, plot, seed).print(as_json)


@app.command("simulation")
def _simulation(
    part: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of each case to simulate.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """How long an hour of 12 GPUs and ten minutes of 1,000 GPUs take on one core, and how much memory."""
    simulation.run(part).print(as_json)
