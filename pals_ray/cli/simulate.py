"""`pals simulate` and `pals validate-simulation`: scenarios on a virtual clock, and compared with a live fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import pals_ray.bench.validate_simulation as validation
from pals_ray.cli.options import AsJson, Jobs, SampleTrace
from pals_ray.evaluation.policy_tables import terminal_table
from pals_ray.evaluation.results import shown
from pals_ray.evaluation.scenario_run import plan_scenario, run_plans, write_report
from pals_ray.plots.tables import Report


def simulate(
    scenario: Annotated[str, typer.Argument(help="A shipped scenario's name, or the path of a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures and page; cases in it are not run again.")],
    policy: Annotated[
        list[str] | None, typer.Option(help="Only this policy (repeatable); static is always run.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds; default: the scenario's.")] = None,
    case: Annotated[str | None, typer.Option(help="Only cases whose name contains this.")] = None,
    jobs: Jobs = None,
    sample_trace: SampleTrace = False,
    as_json: AsJson = False,
) -> None:
    """Simulate a scenario under each policy; what it costs, serves and misses, side by side."""
    plan = plan_scenario(scenario, sample_trace, policy or (), seeds, case)
    (found,) = run_plans([plan], out, jobs, Console(stderr=as_json))
    page = write_report(plan, found, out)
    table = terminal_table(found, f"{found['scenario']}: {len(found['cases'])} cases")
    lines = [
        f"left out, since static cannot serve it: {', '.join(o['left_out'])} ({o['case']})" for o in found["left_out"]
    ]
    Report(shown(found), table, *lines, f"page, pictures and every case: {page}").print(as_json, indent=2)


def validate_simulation(
    seconds: Annotated[float, typer.Option(help="How long each point is compared, once settled.", min=5)] = 40.0,
    seed: Annotated[int, typer.Option(help="Of the requests, which both sides get alike.", min=0)] = 1,
    as_json: AsJson = False,
) -> None:
    """Serve the default fleet for some minutes and simulate the same; exit code 1 where the two differ by too much.

    Live are Ray Serve, vLLM, agents and manager, on virtual GPUs; simulated are all of these but the control code.
    """
    found = validation.run(seconds, seed)
    found.print(as_json, indent=2)
    if not found.figures["within"]:
        raise typer.Exit(1)
