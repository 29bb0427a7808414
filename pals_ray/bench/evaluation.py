"""`make bench`: every shipped scenario, its tables beside PALS's own numbers, into `docs/evaluation.md`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pals_ray.evaluation.policy_tables import gain, gain_with_width, policy_rows
from pals_ray.evaluation.results import summary
from pals_ray.evaluation.scenario_run import plan_scenario, run_plans, write_report
from pals_ray.plots.tables import Json, markdown_table, percent, replace_between

SCENARIOS = ("pals_node", "pals_cluster", "demand_response", "regulation", "mixed_fleet", "failures")
_BEGIN, _END = "<!-- bench: begin -->", "<!-- bench: end -->"
#: Pictures that the page shows, by scenario.
PICTURES = {
    "pals_node": ("tokens_per_joule.png", "operating_points.png"),
    "pals_cluster": ("power.png", "violations.png"),
    "demand_response": ("power.png",),
    "regulation": ("power.png",),
}


def _policies(policies: Json) -> list[str]:
    return markdown_table(["", *policies], policy_rows(policies))


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
    head = ["models, loads", "policy", "gain node", "gain GPU", "counted node", "counted GPU", "violations"]
    for gpu in dict.fromkeys(case["gpu"] for case in cases):
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
                gains = [gain(found[f"gain_over_static{of}"]) for of in ("", "_gpu", "_counted", "_gpu_counted")]
                of_oracle = percent(found["share_of_oracle_gain"], "z.0f")
                rows.append([name, policy, *gains, percent(found["violation_rate"]), of_oracle])
        lines += [f"#### {gpu}", "", *markdown_table([*head, "of the oracle's"], rows)]
    return lines


def cluster_section(cases: Sequence[Json]) -> list[str]:
    """`pals_cluster`, a table for each load, with confidence intervals over seeds."""
    lines = []
    head = ["policy", "tokens/J", "over uniform", "over static (no budget)", "violations", "pals's x", "goodput/s"]
    for case in cases:
        policies = case["policies"]
        reference = policies.get("uniform", policies["static"])["figures"]["tokens_per_joule"]
        ours = policies["pals"]["figures"]["violation_rate"]
        rows = []
        for name, entry in policies.items():
            found = entry["figures"]
            rate = found["violation_rate"]
            rows.append(
                [
                    name,
                    f"{found['tokens_per_joule']:.3f}",
                    gain(found["tokens_per_joule"] / reference - 1),
                    gain_with_width(entry["gain_over_static"]),
                    _rate(entry),
                    "-" if not ours or rate is None else f"{rate / ours:.1f}x",
                    f"{found['goodput_tokens_per_s']:.0f}",
                    f"{found['over_budget_s']:.1f} s, {found['over_budget_max_w']:.0f} W",
                ]
            )
        lines += [f"#### Mean load {case['load']:g}", "", *markdown_table([*head, "drawn over budget"], rows)]
    return lines


def response_section(cases: Sequence[Json]) -> list[str]:
    """`demand_response`: goodput and tokens at each budget, and the event."""
    lines = []
    sweep = _constant(cases)
    if sweep:
        names = [name for name in sweep[0]["policies"] if name != "static"]
        rows = [[f"{case['budget_share']:.0%}", *(_served(case["policies"][name]) for name in names)] for case in sweep]
        lines += ["Goodput / all tokens per s, violations, at constant budgets:", ""]
        lines += markdown_table(["budget", *names], rows)
    for case in cases:
        if case["budget"] == "event":
            lines += ["The event:", "", *_policies(summary("", [case])["policies"])]
    return lines


def _constant(cases: Sequence[Json]) -> list[Json]:
    return [case for case in cases if case["budget"] == "constant"]


def _served(entry: Json) -> str:
    found = entry["figures"]
    return f"{found['goodput_tokens_per_s']:.0f} / {found['tokens_per_s']:.0f}, {_rate(entry)}"


def compared(found: dict[str, Json]) -> list[str]:
    """PALS's own numbers and ours of the same kind."""
    rows = []
    node = found.get("pals_node", {}).get("cases", [])
    for gpu in dict.fromkeys(case["gpu"] for case in node):
        chosen = [case for case in node if case["gpu"] == gpu]
        ours, batch = _mean_over(chosen, "pals"), _mean_over(chosen, "batch_only")
        both = f"{gain(ours['gain_over_static'])} (counted {gain(ours['gain_over_static_counted'])})"
        share = percent(ours["share_of_oracle_gain"], "z.0f")
        rows.append([f"tokens/J over full cap and batch 64, node level, {gpu}", "+26.3 %", both])
        rows.append([f"counted part of the oracle's gain, {gpu}", "95 %", share])
        rows.append([f"batch alone, {gpu}", "+14 %", gain(batch["gain_over_static"])])
    for case in found.get("pals_cluster", {}).get("cases", []):
        figures = {name: entry["figures"] for name, entry in case["policies"].items()}
        names = [name for name in ("power_only", "batch_only", "pals") if name in figures]
        said = ", ".join(f"{name} {percent(figures[name]['violation_rate'])}" for name in names)
        better = figures["pals"]["tokens_per_joule"] / figures["uniform"]["tokens_per_joule"] - 1
        rows.append([f"violations, cluster at load {case['load']:g}", "18.7-35.2 % -> 3.2-5.3 %", said])
        rows.append([f"cluster tokens/J over uniform, load {case['load']:g}", "+12.1 %", gain(better)])
    gains = []
    for case in _constant(found.get("demand_response", {}).get("cases", [])):
        ours, theirs = (case["policies"][n]["figures"]["goodput_tokens_per_s"] for n in ("pals", "power_only"))
        if theirs > 0:
            gains.append(ours / theirs - 1)
    if gains:
        label = "goodput over power-only under a cut budget, the most"
        rows.append([label, "up to +22 % (throughput)", gain(max(gains))])
    following = found.get("regulation", {}).get("policies", {}).get("pals")
    if following is not None:
        said = f"{percent(following['tracking_error'])}, AQA {following['aqa_error']:.3f}"
        score = f"PJM {following['pjm_score']:.3f}, precision {following['precision']:.3f}"
        rows.append(["a regulation signal: relative tracking error", "-", f"{said}, {score}"])
    return markdown_table(["figure", "PALS (arXiv 2605.21427)", "here"], rows)


def page(found: dict[str, Json], about: dict[str, str]) -> str:
    """The generated part of `docs/evaluation.md`; both by scenario."""
    sections = {"pals_node": node_section, "pals_cluster": cluster_section, "demand_response": response_section}
    lines = ["## Beside PALS's own numbers", "", *compared(found), "## Scenarios", ""]
    for name, result in found.items():
        lines += [f"### {name}", "", about[name], ""]
        lines += sections[name](result["cases"]) if name in sections else _policies(result["policies"])
        lines += [f"![{name}](evaluation/{name}_{picture})" for picture in PICTURES.get(name, ())]
        lines.append("")
    missing = [name for name in SCENARIOS if name not in found]
    if missing:
        lines += [f"Not run for this page: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def run(names: Sequence[str], out: Path, docs: Path, processes: int | None, sample_trace: bool) -> Path:
    """Run these scenarios, keeping every case in `out`, and write the generated part of the docs' page."""
    plans = [plan_scenario(name, sample_trace) for name in names]
    found = {}
    for plan, result in zip(plans, run_plans(plans, out, processes, Console()), strict=True):
        name = plan.scenario.name
        found[name] = result
        write_report(plan, result, out / name)
        for picture in PICTURES.get(name, ()):
            (docs / "evaluation").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / name / picture, docs / f"evaluation/{name}_{picture}")
    file = docs / "evaluation.md"
    replace_between(file, _BEGIN, _END, page(found, {plan.scenario.name: plan.scenario.about for plan in plans}))
    return file
