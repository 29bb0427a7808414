"""Pictures of a simulated scenario: power against budget, tokens/J, late requests, operating points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from pals_ray.config.scenario import POLICIES, FleetSpec
from pals_ray.models.physics.roofline import RooflineModel, Workload
from pals_ray.models.physics.step_cost import GroupPhysics
from pals_ray.models.specs import Parallelism, find_gpu, find_model
from pals_ray.plots.picture import picture, shades
from pals_ray.plots.tables import Json

_COLORS = ("grey", "brown", "olive", "pink", "orange", "blue", "red", "purple")
#: A colour for every policy, and for the oracle.
COLORS = {policy: f"tab:{color}" for policy, color in zip(POLICIES, _COLORS, strict=True)} | {"oracle": "black"}
_MOST_PANELS = 4


def _color(policy: str) -> str:
    return COLORS.get(policy.partition("@")[0], "tab:green")


def _hatch(policy: str) -> str:
    """Bars of engines that start at another batch than the scenario's are hatched."""
    return "//" if "@" in policy else ""


def _averaged(policies: Json) -> str:
    """How many cases the figures of a summary are means of."""
    cases = max(entry["cases"] for entry in policies.values())
    return "one case" if cases == 1 else f"mean of {cases} cases"


def plot_power(cases: Sequence[Json], path: Path) -> None:
    """Node power, budget and (with a signal) target over time, a panel for each kind of budget."""
    kinds: dict[str, Json] = {}
    for case in cases:
        kinds.setdefault(case["budget"], case)
    chosen = list(kinds.values())[:_MOST_PANELS]
    title = "Power against budget (modelled, first seed)"
    with picture(path, title, (11, 3.4 * len(chosen)), len(chosen)) as axes:
        for axis, case in zip(axes.flat, chosen, strict=True):
            for policy, found in case["series"].items():
                minutes = np.array(found["time_s"]) / 60
                width, depth = (1.4, 3) if policy == "pals" else (0.9, 2)
                axis.plot(minutes, found["node_power_w"], color=_color(policy), lw=width, zorder=depth, label=policy)
            last = case["series"].get("pals") or list(case["series"].values())[-1]
            minutes = np.array(last["time_s"]) / 60
            axis.step(minutes, last["budget_w"], color="black", lw=1, ls="--", where="pre", label="budget")
            if last["target_w"] is not None:
                axis.plot(minutes, last["target_w"], color="tab:green", lw=1, label="target")
            axis.set_title(case["case"], fontsize=10)
            axis.set(ylabel="node W", ylim=(0, None))
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8, ncols=4, loc="lower right")
        axes[-1, 0].set_xlabel("minutes")


def plot_efficiency(summary: Json, path: Path) -> None:
    """Gain in tokens/J over static at both boundaries, and the tokens/J themselves."""
    policies = summary["policies"]
    places = np.arange(len(policies))
    title = f"Output tokens per joule, {_averaged(policies)}: left bar of a pair at node level, pale bar GPUs alone"
    panels = (
        ("tokens_per_joule", "tokens/J", 1.0, "{:.2f}"),
        ("gain_over_static", "gain in tokens/J over static, %", 100.0, "{:z.0f}"),
    )
    boundaries = (("", "node", 1.0, -0.19), ("_gpu", "GPU", 0.55, 0.19))
    with picture(path, title, (11, 4.2), 1, 2) as axes:
        for axis, (key, label, scale, form) in zip(axes.flat, panels, strict=True):
            for suffix, boundary, alpha, shift in boundaries:
                values = [scale * entry[key + suffix] for entry in policies.values()]
                style = {"color": list(map(_color, policies)), "hatch": list(map(_hatch, policies)), "alpha": alpha}
                bars = axis.bar(places + shift, values, 0.36, label=boundary, edgecolor="white", lw=0, **style)
                axis.bar_label(bars, fmt=form, fontsize=7, padding=2)
            axis.set_xticks(places, list(policies), rotation=30, ha="right", fontsize=8)
            axis.set_ylabel(label)
            axis.axhline(0, color="black", lw=0.6)
            axis.grid(alpha=0.25, axis="y")


def plot_attainment(summary: Json, path: Path) -> None:
    """Late requests by model, a group of bars for each policy, and over all models as a line across each group."""
    policies = summary["policies"]
    models = list(dict.fromkeys(m for entry in policies.values() for m in entry["attainment_by_model"]))
    places, width = np.arange(len(policies)), 0.8 / len(models)
    with picture(path, "", (11, 4.2)) as axes:
        axis = axes[0, 0]
        for at, (model, color) in enumerate(zip(models, shades(len(models)), strict=True)):
            known = (entry["attainment_by_model"].get(model) for entry in policies.values())
            values = [0.0 if share is None else 100 * (1.0 - share) for share in known]
            axis.bar(places - 0.4 + (at + 0.5) * width, values, width, color=color, label=model)
        for at, entry in enumerate(policies.values()):
            rate, label = 100 * (entry["late_rate"] or 0.0), None if at else "all models"
            axis.plot([at - 0.42, at + 0.42], [rate, rate], color="tab:red", lw=1.5, label=label)
            axis.annotate(f"{rate:.1f} %", (at, rate), (0, 4), textcoords="offset points", ha="center", fontsize=8)
        axis.set_xticks(places, list(policies), rotation=20, ha="right", fontsize=8)
        axis.set_title(f"Late requests, {_averaged(policies)}", fontsize=11)
        axis.set(ylabel="late, % of requests", ylim=(0, None))
        axis.grid(alpha=0.25, axis="y")
        axis.legend(fontsize=7, ncols=3)


def plot_points(fleets: Sequence[FleetSpec], cases: Sequence[Json], workload: Workload, path: Path) -> None:
    """Where each policy spent its time, over the tokens/J that the roofline gives a full batch, a panel per model."""
    panels: dict[tuple[str, str], tuple[FleetSpec, Json]] = {}
    specs = {fleet.name: fleet for fleet in fleets}
    for case in cases:
        for model in specs[case["fleet"]].models:
            panels.setdefault((model.name, case["gpu"]), (specs[case["fleet"]], case))
    chosen = list(panels.items())[:_MOST_PANELS]
    columns = min(len(chosen), 2)
    rows = -(-len(chosen) // columns)
    title = "Operating points (area: share of time) over tokens/J of the GPUs at a full batch"
    with picture(path, title, (5.6 * columns, 4.4 * rows), rows, columns) as axes:
        for axis, ((name, _), (fleet, case)) in zip(axes.flat, chosen, strict=False):
            _surface(axis, fleet, name, case, workload)
        for axis in axes.flat[len(chosen) :]:
            axis.axis("off")
        for mark in axes[0, 0].legend(fontsize=7, loc="upper left").legend_handles:
            mark.set_sizes([40])


def _surface(axis: Axes, fleet: FleetSpec, name: str, case: Json, workload: Workload) -> None:
    model = next(m for m in fleet.models if m.name == name)
    gpu = find_gpu(next(node.gpu for node in fleet.nodes if name in node.models))
    physics = GroupPhysics(gpu, find_model(name), Parallelism(model.tensor_parallel, model.expert_parallel))
    caps = np.linspace(gpu.min_limit_w, gpu.max_limit_w, 61)
    batches = np.linspace(1, model.max_batch, 64)
    said = RooflineModel(physics, workload).predict(caps[:, None], batches[None, :])
    filled = axis.contourf(batches, caps, said.throughput_tokens_per_s / said.power_w, 14, cmap="Greys", alpha=0.6)
    axis.figure.colorbar(filled, ax=axis, label="tokens/J, GPU")
    for policy, entry in case["policies"].items():
        if points := entry["points"].get(name):
            cap_w, batch, share = np.array(points, dtype=np.float64).T
            style = {"color": _color(policy), "alpha": 0.7, "lw": 0, "label": policy, "clip_on": False}
            axis.scatter(batch, cap_w, s=8 + 160 * share, **style)
    axis.set_title(f"{name} on {gpu.name}\n{case['case']}", fontsize=8)
    axis.set(xlabel="batch limit", ylabel="cap, W per GPU")
