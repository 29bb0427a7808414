"""`make bench`: every shipped scenario, its tables beside PALS's own numbers, into `docs/evaluation.md`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pals_ray.evaluation.evaluation_page import page
from pals_ray.evaluation.scenario_run import plan_scenario, run_plans, write_report
from pals_ray.plots.tables import replace_between

SCENARIOS = (
    "pals_node",
    "pals_paper",
    "pals_paper_cluster",
    "pals_cluster",
    "demand_response",
    "mixed_fleet",
    "regulation",
    "failures",
)
_BEGIN, _END = "<!-- bench: begin -->", "<!-- bench: end -->"
#: Pictures that the page shows, by scenario.
PICTURES = {
    "pals_node": ("tokens_per_joule.png", "operating_points.png"),
    "pals_cluster": ("power.png", "attainment.png"),
    "demand_response": ("power.png",),
    "regulation": ("power.png",),
}


def run(
    names: Sequence[str], out: Path, docs: Path, processes: int | None, sample_trace: bool, seeds: int | None
) -> Path:
    """Run these scenarios, keeping every case in `out`, and write the generated part of the docs' page; a page that is
    not there yet is begun."""
    plans = [plan_scenario(name, sample_trace, seeds=seeds) for name in names]
    found = {}
    for plan, result in zip(plans, run_plans(plans, out, processes, Console()), strict=True):
        name = plan.scenario.name
        found[name] = result
        write_report(plan, result, out / name)
        for picture in PICTURES.get(name, ()):
            (docs / "evaluation").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / name / picture, docs / f"evaluation/{name}_{picture}")
    file = docs / "evaluation.md"
    if not file.exists():
        file.write_text(f"# Evaluation\n\n{_BEGIN}\n{_END}\n")
    text = page(found, {plan.scenario.name: plan.scenario.about for plan in plans}, PICTURES)
    missing = [name for name in SCENARIOS if name not in found]
    if missing:
        text += f"\nNot run for this page: {', '.join(missing)}.\n"
    replace_between(file, _BEGIN, _END, text)
    return file
