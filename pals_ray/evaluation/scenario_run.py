"""A whole scenario: from its file to jobs, to results, and to a folder with tables, pictures and one page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pals_ray.config.reader import ConfigError, check
from pals_ray.config.scenario import Scenario, find_scenario, load_scenario
from pals_ray.errors import PalsError
from pals_ray.evaluation.cache import Job, run_jobs
from pals_ray.evaluation.cases import cases_of, drawn_lengths, read_lengths
from pals_ray.evaluation.html_page import html_report
from pals_ray.evaluation.policy_tables import cases_csv
from pals_ray.evaluation.results import shown, summary
from pals_ray.models.physics.roofline import Workload
from pals_ray.plots.tables import Json


@dataclass(frozen=True)
class ScenarioPlan:
    """A scenario that is ready to run: the name of the file its requests are from, and a job for each case."""

    scenario: Scenario
    trace: str
    jobs: tuple[Job, ...]


def plan_scenario(
    name: str,
    sample_trace: bool = False,
    policies: Sequence[str] = (),
    seeds: int | None = None,
    only: str | None = None,
) -> ScenarioPlan:
    """Read a scenario, by its shipped name or the path of its file; with these policies where any are given, and with
    the cases whose name contains `only`. Raises `ConfigError`."""
    path = find_scenario(name)
    spec = load_scenario(path)
    if policies:
        spec = check(Scenario, {**spec.model_dump(), "policies": tuple(policies)}, "--policy cannot be used")
    lengths = read_lengths(spec, path.parent, sample_trace)
    every = cases_of(spec)
    cases = [case for case in every if only is None or only in case.name]
    if not cases:
        raise ConfigError(f"no case of {spec.name} contains {only!r}: {'; '.join(case.name for case in every)}")
    drawn = {fleet.name: drawn_lengths(fleet.lengths) for fleet in spec.fleets if fleet.lengths is not None}
    jobs = tuple(
        Job(case, drawn.get(case.fleet.name, lengths), path.parent, spec.policies, seeds_of(spec, seeds))
        for case in cases
    )
    return ScenarioPlan(spec, spec.trace.sample if sample_trace else Path(spec.trace.path).name, jobs)


def seeds_of(spec: Scenario, how_many: int | None) -> tuple[int, ...]:
    """The scenario's seeds, or as many as asked: beyond its own the next numbers that it tunes nothing on."""
    if how_many is None:
        return spec.seeds
    further = (number for number in count(1) if number not in (*spec.seeds, *spec.tuning_seeds))
    return tuple(islice(chain(spec.seeds, further), how_many))


def run_plans(plans: Sequence[ScenarioPlan], out: Path, processes: int | None, console: Console) -> list[Json]:
    """Run all jobs of all plans, with a progress bar, and give each plan's summary. None: a process for each core."""
    jobs = [job for plan in plans for job in plan.jobs]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=sum(job.about_runs() for job in jobs))

        def tick(name: str, runs: int) -> None:
            progress.update(task, advance=runs, description=name)

        results = {job.name: result for job, result in run_jobs(jobs, out, processes or os.cpu_count() or 1, tick)}
    return [summary(plan.scenario.name, [results[job.name] for job in plan.jobs]) for plan in plans]


def write_report(plan: ScenarioPlan, found: Json, out: Path) -> Path:
    """Write CSV, JSON, PNGs and the page into `out`; gives the page's path."""
    from pals_ray.plots.simulation import plot_attainment, plot_efficiency, plot_points, plot_power

    if not found["cases"]:
        raise PalsError(f"static at batch 64 serves no model of {plan.scenario.name} within its limits; loosen them")
    out.mkdir(parents=True, exist_ok=True)
    spec, lengths, cases = plan.scenario, plan.jobs[0].lengths, found["cases"]
    workload = Workload(float(lengths.prompt_tokens.mean()), float(lengths.output_tokens.mean()))
    pictures = []
    for name, title, draw in (
        ("power", "Power against budget", partial(plot_power, cases)),
        ("tokens_per_joule", "Tokens per joule", partial(plot_efficiency, found)),
        ("attainment", "Late requests", partial(plot_attainment, found)),
        ("operating_points", "Operating points", partial(plot_points, spec.fleets, cases, workload)),
    ):
        picture = out / f"{name}.png"
        draw(picture)
        pictures.append((title, picture))
    (out / "cases.csv").write_text(cases_csv(cases))
    (out / "summary.json").write_text(json.dumps(shown(found), indent=1))
    page = out / "report.html"
    page.write_text(html_report(spec, plan.trace, found, pictures))
    return page
