"""The generated part of docs/evaluation.md: findings first, PALS's own numbers beside ours, then every scenario."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from pals_ray.config.scenario import POLICIES
from pals_ray.evaluation.policy_tables import gain, gain_with_width, policy_rows, precise
from pals_ray.evaluation.results import summary
from pals_ray.plots.tables import Json, markdown_table, percent

#: A case where fewer requests of a baseline are late says nothing of how many it makes late that others do not.
MANY_LATE = 0.05
#: Targets of PALS's protocol whose gains its mean of 26.3 % is set beside.
_PAPER_MEAN = (0.75, 0.6)

Cases = Sequence[Json]


def page(found: Mapping[str, Json], about: Mapping[str, str], pictures: Mapping[str, Sequence[str]]) -> str:
    """The generated part, of the scenarios that were run; all by scenario."""
    lines = ["## Findings", "", *_findings(found), *_beside(found), "## Who controls what", "", *levers()]
    lines += ["## Scenarios", ""]
    for name, result in found.items():
        lines += [f"### {name}", "", about[name], "", *_SECTIONS.get(name, _policies)(result["cases"])]
        if result["left_out"]:
            cases = (f"{', '.join(of['left_out'])} ({of['case']})" for of in result["left_out"])
            lines += [f"Left out, since `static` does not attain their SLO at any load: {'; '.join(cases)}.", ""]
        lines += [f"![{name}](evaluation/{name}_{picture})" for picture in pictures.get(name, ())]
        lines.append("")
    return "\n".join(lines)


def levers() -> list[str]:
    """Which levers each policy leaves to the controllers."""
    return markdown_table(["policy", "what the agents' controllers choose"], list(POLICIES.items()))


# -- findings ----------------------------------------------------------------------------------------------------------


def _findings(found: Mapping[str, Json]) -> list[str]:
    rows: list[list[str]] = []
    for gpu, limits, cases in _node_groups(_cases(found, "pals_node")):
        policies = summary("", cases)["policies"]
        if not {"pals", "oracle"} <= set(policies):
            continue
        own, best = policies["pals"], policies["oracle"]
        said = f"{gain(own['gain_over_static_counted'])} of {gain(best['gain_over_static'])}"
        share = percent(own["share_of_oracle_gain"], "z.0f")
        rows.append([f"tokens/J over `static`, {gpu}, {limits}: `pals` of the oracle's", f"{said} ({share})"])
        rows.append(["attainment there: mean, least", f"{precise(own['attainment'])}, {precise(_least(cases))}"])
    cluster = _cases(found, "pals_cluster")
    for name in ("power_only@64", "batch_only@64", "uniform@64", "exact"):
        ratios = [_late(case, "pals") / _late(case, name) for case in cluster if _late(case, name) >= MANY_LATE]
        if ratios:
            rows.append([f"cluster: late requests over those of `{name}`, where it has 5 %", f"{fmean(ratios):.2f}"])
    for part, more in _more_tokens(found):
        if part <= 0.5:
            rows.append([f"tokens/s over `power_only@64` at {part:.0%} of the budget", gain(more)])
    for case in _cases(found, "mixed_fleet"):
        if "equal" in case["fleet"]:
            goods = {name: entry["figures"]["goodput_tokens_per_s"] for name, entry in case["policies"].items()}
            said = ", ".join(f"`{name}` {good:.0f}" for name, good in goods.items())
            rows.append(["mixed fleet, equal priorities: goodput, tokens/s", said])
    return markdown_table(["", ""], rows) if rows else []


def _more_tokens(found: Mapping[str, Json]) -> list[tuple[float, float]]:
    """(share of the budget, tokens/s of `pals` over those of `power_only@64`, less 1) at each constant budget."""
    out = []
    for case in _cases(found, "demand_response"):
        served = {name: entry["figures"]["tokens_per_s"] for name, entry in case["policies"].items()}
        if case["budget_kind"] == "constant" and "power_only@64" in served:
            out.append((float(case["budget_share"]), served["pals"] / served["power_only@64"] - 1.0))
    return out


def _least(cases: Cases) -> float:
    return min(float(case["policies"]["pals"]["pooled_attainment"]) for case in cases)


def _late(case: Json, policy: str) -> float:
    entry = case["policies"].get(policy)
    return 0.0 if entry is None else float(entry["figures"]["late_rate"] or 0.0)


def _cases(found: Mapping[str, Json], name: str) -> Cases:
    return found[name]["cases"] if name in found else []


def _node_groups(cases: Cases) -> Iterable[tuple[str, str, Cases]]:
    for gpu, limits in dict.fromkeys((case["gpu"], case["limit_set"]) for case in cases):
        yield gpu, limits, [case for case in cases if (case["gpu"], case["limit_set"]) == (gpu, limits)]


# -- beside PALS -------------------------------------------------------------------------------------------------------


def _beside(found: Mapping[str, Json]) -> list[str]:
    """PALS's numbers and ours, by its own definitions."""
    rows: list[list[str]] = []
    paper = _cases(found, "pals_paper")
    for lengths in dict.fromkeys(case["fleet"].split()[0] for case in paper):
        chosen = [case for case in paper if case["fleet"].startswith(lengths) and case["target"] in _PAPER_MEAN]
        if chosen:
            for name, theirs in (("grid_batch_only@64", "+14 %"), ("grid_joint@64", ""), ("pals@64", "+26.3 %")):
                label = f"tokens/J over 400 W and batch 64, targets 75 and 60 %, {lengths}: `{name}`"
                rows.append([label, theirs or "-", gain(_mean_gain(chosen, name))])
            rows.append([f"the same on engines at 256, {lengths}: `pals`", "-", gain(_mean_gain(chosen, "pals"))])
            share = summary("", chosen)["policies"]["pals@64"]["share_of_oracle_gain"]
            rows.append([f"part of the oracle's gain, {lengths}: `pals@64`", "95 %", percent(share, "z.0f")])
    for case in _cases(found, "pals_paper_cluster"):
        for key, window in (
            ("under_target_half_s", "0.5 s"),
            ("under_target_5_s", "5 s"),
            ("under_target_60_s", "60 s"),
        ):
            said = ", ".join(f"`{n}` {percent(e['figures'][key])}" for n, e in case["policies"].items())
            theirs = "18.7-35.2 % (static) -> 3.2-5.3 %"
            rows.append([f"time under a target of {case['target']:.0%}, means over {window}", theirs, said])
    for case in _cases(found, "pals_cluster"):
        if case["demand"] == "together":
            better = case["policies"]["pals"]["gain_over_static"]["mean"]
            rows.append([f"cluster tokens/J over static, load {case['load']:g}", "+12.1 %", gain(better)])
    gains = [more for _, more in _more_tokens(found)]
    if gains:
        rows.append(["throughput over power-only under a cut budget, the most", "up to +22 %", gain(max(gains))])
    if not rows:
        return []
    table = markdown_table(["figure", "PALS (arXiv 2605.21427)", "here"], rows)
    joint = (
        "Within batch 1 to 64 joint control gains what power-only gains: tokens/J rise with the batch at any cap, here "
        "as in the sweep that PALS's first author published. It pays above 64 places, where prefill and SLOs limit "
        "what a step may take, and where replicas share a budget."
    )
    return ["## Beside PALS's own numbers", "", *table, *([joint, ""] if paper else [])]


def _mean_gain(cases: Cases, policy: str) -> float:
    return fmean(case["policies"][policy]["gain_over_static"]["mean"] for case in cases)


# -- scenarios ---------------------------------------------------------------------------------------------------------


def _policies(cases: Cases) -> list[str]:
    """Every figure of every policy, for each fleet and target."""
    lines = []
    for fleet, target in dict.fromkeys((case["fleet"], case["target"]) for case in cases):
        policies = summary("", [case for case in cases if (case["fleet"], case["target"]) == (fleet, target)])[
            "policies"
        ]
        title = fleet if target is None else f"{fleet}, target {target:.0%}"
        lines += [f"{title}:", "", *markdown_table(["", *policies], policy_rows(policies))]
    return lines


def _node_section(cases: Cases) -> list[str]:
    """`pals_node`: a table for each GPU type and set of limits, a row for each model."""
    lines = []
    for gpu, limits, chosen in _node_groups(cases):
        names = list(dict.fromkeys(name for case in chosen for name in case["policies"] if name != "static"))
        rows = []
        for fleet in dict.fromkeys(case["fleet"] for case in chosen):
            own = [case for case in chosen if case["fleet"] == fleet]
            rows.append([fleet.partition(" ")[2], *(_cells(own, name) for name in names)])
        rows.append(["mean", *(_cells(chosen, name) for name in names)])
        loads = ", ".join(f"{load:g}" for load in dict.fromkeys(case["load"] for case in chosen))
        lines += [f"#### {gpu}, {limits}", "", f"Counted gain in tokens/J and attainment, mean of loads {loads}:", ""]
        lines += markdown_table(["model", *names], rows)
    return lines


def _cells(cases: Cases, name: str) -> str:
    found = summary("", cases)["policies"][name]
    key = "gain_over_static" if name.startswith("oracle") else "gain_over_static_counted"
    return f"{gain(found[key])}, {precise(found['attainment'])}"


def _cluster_section(cases: Cases) -> list[str]:
    """`pals_cluster`, a table for each case, with confidence intervals over seeds."""
    lines = []
    head = ["policy", "late", "goodput/s", "tokens/J", "over static (no budget)", "drawn over budget"]
    for case in cases:
        rows = []
        for name, entry in case["policies"].items():
            figures = entry["figures"]
            over = f"{figures['over_budget_s']:.1f} s, {figures['over_budget_max_w']:.0f} W"
            good, efficiency = f"{figures['goodput_tokens_per_s']:.0f}", f"{figures['tokens_per_joule']:.3f}"
            rows.append([name, _late_cell(entry), good, efficiency, gain_with_width(entry["gain_over_static"]), over])
        peaks = "all models' peaks together" if case["demand"] == "together" else "each model's own demand"
        lines += [f"#### {case['budget']}, load {case['load']:g}, {peaks}", "", *markdown_table(head, rows)]
    return lines


def _late_cell(entry: Json) -> str:
    mean, width = entry["figures"]["late_rate"], entry["half_width"]["late_rate"]
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}{'' if width is None else f' ± {100 * width:.2f}'} %"


def _response_section(cases: Cases) -> list[str]:
    """`demand_response`: goodput and tokens at each budget, and the event."""
    lines = []
    sweep = [case for case in cases if case["budget_kind"] == "constant"]
    if sweep:
        names = [name for name in sweep[0]["policies"] if name != "static"]
        rows = [[f"{case['budget_share']:.0%}", *(_served(case["policies"][name]) for name in names)] for case in sweep]
        lines += ["Goodput / all tokens per s, late requests, at constant budgets:", ""]
        lines += markdown_table(["budget", *names], rows)
    event = [case for case in cases if case["budget_kind"] == "event"]
    return lines + (["The event:", "", *_policies(event)] if event else [])


def _served(entry: Json) -> str:
    found = entry["figures"]
    return f"{found['goodput_tokens_per_s']:.0f} / {found['tokens_per_s']:.0f}, {_late_cell(entry)}"


def _paper_section(cases: Cases) -> list[str]:
    """`pals_paper`: a table for each kind of lengths, a row for each target, the mean of models; then each model."""
    lines = []
    for lengths in dict.fromkeys(case["fleet"].split()[0] for case in cases):
        chosen = [case for case in cases if case["fleet"].startswith(lengths)]
        names = [name for name in chosen[0]["policies"] if name != "static"]
        for by, key in (("target", _target), ("model", _model)):
            rows = []
            for value in dict.fromkeys(map(key, chosen)):
                own = [case for case in chosen if key(case) == value]
                rows.append([value, *(gain(_mean_gain(own, name)) for name in names)])
            lines += [f"{lengths}-like lengths, gain in tokens/J over static, by {by}:", ""]
            lines += markdown_table([by, *names], rows)
    return lines


def _target(case: Json) -> str:
    return f"{case['target']:.0%}"


def _model(case: Json) -> str:
    return str(case["fleet"].partition(" ")[2])


_SECTIONS: Mapping[str, Callable[[Cases], list[str]]] = {
    "pals_node": _node_section,
    "pals_cluster": _cluster_section,
    "demand_response": _response_section,
    "pals_paper": _paper_section,
}
