"""`make bench`: every shipped scenario, its tables beside PALS's own numbers, into `docs/evaluation.md`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pals_ray.cli.simulate import jobs_of, results_of, write_all
from pals_ray.config.scenario import find_scenario, load_scenario
from pals_ray.evaluation.cases import read_lengths
from pals_ray.evaluation.results import summary
from pals_ray.evaluation.tables import shown

Json = dict[str, Any]

SCENARIOS = ("pals_node", "pals_cluster", "demand_response", "regulation", "mixed_fleet", "failures")
_BEGIN, _END = "<!-- bench: begin -->", "<!-- bench: end -->"
#: Pictures that the page shows, by scenario.
PICTURES = {
    "pals_node": ("tokens_per_joule.png", "operating_points.png"),
    "pals_cluster": ("power.png", "violations.png"),
    "demand_response": ("power.png",),
    "regulation": ("power.png",),
}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _policies(policies: Json) -> list[str]:
    return _table(["", *policies], [[title, *cells] for title, cells in shown(policies)])


def _percent(value: float | None, form: str = "+z.1f") -> str:
    return "-" if value is None else f"{100 * value:{form}} %"


def _with_width(found: Json) -> str:
    width = "" if found["half_width"] is None else f" ± {100 * found['half_width']:.1f}"
    return f"{_percent(found['mean'])}{width}"


def _rate(entry: Json) -> str:
    mean, width = entry["figures"]["violation_rate"], entry["half_width"]["violation_rate"]
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}{'' if width is None else f' ± {100 * width:.1f}'} %"


def _mean_over(cases: Sequence[Json], policy: str) -> Json:
    found: Json = summary("", cases)["policies"].get(policy, {})
    return found


def node_section(cases: Sequence[Json]) -> list[str]:
    """`pals_node` by GPU type and kind of model, and saturated."""
    lines = []
    for gpu in dict.fromkeys(case["gpu"] for case in cases):
        head = ["models, loads", "policy", "gain node", "gain GPU", "counted node", "counted GPU", "violations"]
        rows = []
        for kind, saturated in (("all", False), ("dense", False), ("moe", False), ("all", True)):
            chosen = [
                case
                for case in cases
                if case["gpu"] == gpu and kind in ("all", case["kind"]) and (case["load"] is None) == saturated
            ]
            name = f"{kind}, {'saturated' if saturated else '0.9, 0.7, 0.5'} ({len(chosen)})"
            for policy in dict.fromkeys(p for case in chosen for p in case["policies"]):
                found = _mean_over(chosen, policy)
                gains = [found[f"gain_over_static{suffix}"] for suffix in ("", "_gpu", "_counted", "_gpu_counted")]
                share = found["share_of_oracle_gain"]
                of_oracle = "-" if share is None else f"{100 * share:z.0f} %"
                rows.append([name, policy, *map(_percent, gains), _percent(found["violation_rate"], ".1f"), of_oracle])
        lines += [f"#### {gpu}", "", *_table([*head, "of the oracle's"], rows)]
    return lines


def cluster_section(cases: Sequence[Json]) -> list[str]:
    """`pals_cluster`, a table for each load, with confidence intervals over seeds."""
    lines = []
    for case in cases:
        policies = case["policies"]
        reference = policies.get("uniform", policies["static"])["figures"]["tokens_per_joule"]
        ours = policies["pals"]["figures"]["violation_rate"]
        rows = []
        for name, entry in policies.items():
            found = entry["figures"]
            rate = found["violation_rate"]
            ratio = "-" if not ours or rate is None else f"{rate / ours:.1f}x"
            rows.append(
                [
                    name,
                    f"{found['tokens_per_joule']:.3f}",
                    _percent(found["tokens_per_joule"] / reference - 1),
                    _with_width(entry["gain_over_static"]),
                    _rate(entry),
                    ratio,
                    f"{found['goodput_tokens_per_s']:.0f}",
                    f"{found['over_budget_s']:.1f} s, {found['over_budget_max_w']:.0f} W",
                ]
            )
        head = ["policy", "tokens/J", "over uniform", "over static (no budget)", "violations", "pals's x", "goodput/s"]
        lines += [f"#### Mean load {case['load']:g}", "", *_table([*head, "drawn over budget"], rows)]
    return lines


def response_section(cases: Sequence[Json]) -> list[str]:
    """`demand_response`: goodput and tokens at each budget, and the event."""
    lines = []
    sweep = [case for case in cases if case["budget"] == "constant"]
    names = [name for name in sweep[0]["policies"] if name != "static"] if sweep else []
    rows = []
    for case in sweep:
        cells = []
        for name in names:
            found = case["policies"][name]["figures"]
            cells.append(
                f"{found['goodput_tokens_per_s']:.0f} / {found['tokens_per_s']:.0f}, {_rate(case['policies'][name])}"
            )
        rows.append([f"{case['budget_share']:.0%}", *cells])
    if rows:
        lines += ["Goodput / all tokens per s, violations, at constant budgets:", ""]
        lines += _table(["budget", *names], rows)
    for case in cases:
        if case["budget"] == "event":
            lines += ["The event:", "", *_policies(summary("", [case])["policies"])]
    return lines


def compared(found: dict[str, Json]) -> list[str]:
    """PALS's own numbers and ours of the same kind."""
    rows = []
    if "pals_node" in found:
        cases = found["pals_node"]["cases"]
        for gpu in dict.fromkeys(case["gpu"] for case in cases):
            chosen = [case for case in cases if case["gpu"] == gpu]
            ours, batch = _mean_over(chosen, "pals"), _mean_over(chosen, "batch_only")
            both = f"{_percent(ours['gain_over_static'])} (counted {_percent(ours['gain_over_static_counted'])})"
            rows.append([f"tokens/J over full cap and batch 64, node level, {gpu}", "+26.3 %", both])
            rows.append(
                [f"counted part of the oracle's gain, {gpu}", "95 %", _percent(ours["share_of_oracle_gain"], "z.0f")]
            )
            rows.append([f"batch alone, {gpu}", "+14 %", _percent(batch["gain_over_static"])])
    for case in found.get("pals_cluster", {}).get("cases", []):
        policies = case["policies"]
        rates = {
            n: policies[n]["figures"]["violation_rate"] for n in ("power_only", "batch_only", "pals") if n in policies
        }
        said = ", ".join(f"{name} {_percent(rate, '.1f')}" for name, rate in rates.items())
        rows.append([f"violations, cluster at load {case['load']:g}", "18.7-35.2 % -> 3.2-5.3 %", said])
        efficiency = {n: policies[n]["figures"]["tokens_per_joule"] for n in ("uniform", "pals")}
        better = _percent(efficiency["pals"] / efficiency["uniform"] - 1)
        rows.append([f"cluster tokens/J over uniform, load {case['load']:g}", "+12.1 %", better])
    sweep = [c for c in found.get("demand_response", {}).get("cases", []) if c["budget"] == "constant"]
    best = [
        _goodput(case, "pals") / _goodput(case, "power_only") - 1 for case in sweep if _goodput(case, "power_only") > 0
    ]
    if best:
        rows.append(
            ["goodput over power-only under a cut budget, the most", "up to +22 % (throughput)", _percent(max(best))]
        )
    following = found.get("regulation", {}).get("policies", {}).get("pals")
    if following is not None:
        said = f"{_percent(following['tracking_error'], '.1f')}, AQA {following['aqa_error']:.3f}"
        score = f"PJM {following['pjm_score']:.3f}, precision {following['precision']:.3f}"
        rows.append(["a regulation signal: relative tracking error", "-", f"{said}, {score}"])
    return _table(["figure", "PALS (arXiv 2605.21427)", "here"], rows)


def _goodput(case: Json, policy: str) -> float:
    return float(case["policies"][policy]["figures"]["goodput_tokens_per_s"])


def page(found: dict[str, Json], about: dict[str, str]) -> str:
    """The generated part of `docs/evaluation.md`; both by scenario."""
    sections = {"pals_node": node_section, "pals_cluster": cluster_section, "demand_response": response_section}
    lines = ["## Beside PALS's own numbers", "", *compared(found), "## Scenarios", ""]
    for name, result in found.items():
        lines += [f"### {name}", "", about[name], ""]
        if name in sections:
            lines += sections[name](result["cases"])
        else:
            lines += _policies(result["policies"])
        lines += [f"![{name}]({_picture(name, picture)})" for picture in PICTURES.get(name, ())]
        lines.append("")
    missing = [name for name in SCENARIOS if name not in found]
    if missing:
        lines += [f"Not run for this page: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def _picture(name: str, picture: str) -> str:
    return f"evaluation/{name}_{picture}"


def evaluation(
    out: Annotated[Path, typer.Option(help="Folder that keeps every case; what is there is not run again.")] = Path(
        "build/bench"
    ),
    docs: Annotated[Path, typer.Option(help="Folder of the docs to update.")] = Path("docs"),
    scenario: Annotated[list[str] | None, typer.Option(help="Only this one, by name or path (repeatable).")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    sample_trace: Annotated[bool, typer.Option("--sample-trace", help="The small synthetic trace shipped.")] = False,
) -> None:
    """Run every scenario and write docs/evaluation.md; begun again, it goes on where it was."""
    plans = []
    for name in scenario or SCENARIOS:
        path = find_scenario(name)
        spec = load_scenario(path)
        lengths = read_lengths(spec, path.parent, sample_trace)
        plans.append((spec, lengths, jobs_of(spec, lengths, path.parent, None, None)))
    every = [job for _, _, cases in plans for job in cases]
    results = results_of(every, out, jobs or os.cpu_count() or 1, Console())
    found, about = {}, {}
    for spec, lengths, cases in plans:
        name = spec.name
        about[name] = spec.about
        found[name] = summary(name, [results[job.name] for job in cases])
        folder = out / name
        trace = spec.trace.sample if sample_trace else Path(spec.trace.path).name
        write_all(spec, lengths, trace, found[name], folder)
        for picture in PICTURES.get(name, ()):
            (docs / "evaluation").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / picture, docs / _picture(name, picture))
    file = docs / "evaluation.md"
    before, _, rest = file.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    file.write_text(f"{before}{_BEGIN}\n\n{page(found, about)}\n{_END}{after}")
    typer.echo(f"written: {file}; pages with every case: {out}/*/report.html")
