"""`pals simulate`: run a scenario's policies on a virtual clock, and write tables, pictures and one page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pals_ray.config.reader import ConfigError, explain
from pals_ray.config.scenario import Scenario, find_scenario, load_scenario
from pals_ray.evaluation.cache import Job, run_jobs
from pals_ray.evaluation.cases import cases_of, read_lengths
from pals_ray.evaluation.report import html_report
from pals_ray.evaluation.results import summary
from pals_ray.evaluation.tables import cases_csv, terminal_table
from pals_ray.models.physics.roofline import Workload
from pals_ray.simulation.traces import Trace

Json = dict[str, Any]


def simulate(
    scenario: Annotated[str, typer.Argument(help="A shipped scenario's name, or the path of a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures and page; cases in it are not run again.")],
    policy: Annotated[
        list[str] | None, typer.Option(help="Only this policy (repeatable); static is always run.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds; default: the scenario's.")] = None,
    case: Annotated[str | None, typer.Option(help="Only cases whose name contains this.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    sample_trace: Annotated[bool, typer.Option("--sample-trace", help="The small synthetic trace shipped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The summary as one JSON object on stdout.")] = False,
) -> None:
    """Simulate a scenario under each policy; what it costs, serves and misses, side by side."""
    path = find_scenario(scenario)
    spec = load_scenario(path)
    if policy:
        spec = with_policies(spec, tuple(policy))
    lengths = read_lengths(spec, path.parent, sample_trace)
    console = Console(stderr=True) if as_json else Console()
    cases = jobs_of(spec, lengths, path.parent, seeds, case)
    results = results_of(cases, out, jobs or os.cpu_count() or 1, console)
    found = summary(spec.name, [results[job.name] for job in cases])
    trace = spec.trace.sample if sample_trace else Path(spec.trace.path).name
    page = write_all(spec, lengths, trace, found, out)
    if as_json:
        print(json.dumps({key: found[key] for key in ("scenario", "policies")}, indent=2))
        return
    console.print(terminal_table(found, f"{spec.name}: {len(found['cases'])} cases"))
    console.print(f"page, pictures and every case: {page}")


def with_policies(spec: Scenario, policies: tuple[str, ...]) -> Scenario:
    """The scenario with other policies. Raises `ConfigError` for one that is not known."""
    try:
        return Scenario.model_validate({**spec.model_dump(), "policies": policies})
    except ValidationError as error:
        raise ConfigError(f"--policy cannot be used:\n{explain(error)}") from error


def jobs_of(spec: Scenario, lengths: Trace, folder: Path, seeds: int | None, only: str | None) -> list[Job]:
    """A job for each case of a scenario whose name contains `only`. Raises `ConfigError` where none does."""
    cases = [case for case in cases_of(spec) if only is None or only in case.name]
    if not cases:
        raise ConfigError(f"no case of {spec.name} contains {only!r}: {'; '.join(c.name for c in cases_of(spec))}")
    return [Job(case, lengths, folder, spec.policies, seeds_of(spec, seeds)) for case in cases]


def results_of(jobs: Sequence[Job], out: Path, processes: int, console: Console) -> dict[str, Json]:
    """The results of jobs by their names, with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=sum(job.runs_at_most() for job in jobs))

        def tick(name: str, runs: int) -> None:
            progress.update(task, advance=runs, description=name)

        return {job.name: result for job, result in run_jobs(jobs, out, processes, tick)}


def seeds_of(spec: Scenario, count: int | None) -> tuple[int, ...]:
    """The scenario's seeds, or as many as asked: beyond its own the next numbers that it tunes nothing on."""
    if count is None:
        return spec.seeds
    taken = list(spec.seeds[:count])
    number = 1
    while len(taken) < count:
        if number not in taken and number not in spec.tuning_seeds:
            taken.append(number)
        number += 1
    return tuple(taken)


def write_all(spec: Scenario, lengths: Trace, trace: str, found: Json, out: Path) -> Path:
    """CSV, JSON, PNGs and the page, into `out`; gives the page's path."""
    from pals_ray.plots.simulation import plot_efficiency, plot_points, plot_power, plot_violations

    out.mkdir(parents=True, exist_ok=True)
    workload = Workload(float(lengths.prompt_tokens.mean()), float(lengths.output_tokens.mean()))
    cases = found["cases"]
    drawings: dict[str, tuple[str, Callable[[Path], None]]] = {
        "power.png": ("Power against budget", lambda path: plot_power(cases, path)),
        "tokens_per_joule.png": ("Tokens per joule", lambda path: plot_efficiency(found, path)),
        "violations.png": ("Violations", lambda path: plot_violations(found, path)),
        "operating_points.png": (
            "Operating points",
            lambda path: plot_points(spec.fleets, cases, workload, path),
        ),
    }
    pictures = []
    for name, (title, draw) in drawings.items():
        draw(out / name)
        pictures.append((title, out / name))
    (out / "cases.csv").write_text(cases_csv(cases))
    bare = [{key: value for key, value in case.items() if key != "series"} for case in cases]
    (out / "summary.json").write_text(json.dumps({**found, "cases": bare}, indent=1))
    page = out / "report.html"
    page.write_text(html_report(spec, trace, found, pictures))
    return page
