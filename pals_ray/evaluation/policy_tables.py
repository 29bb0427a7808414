"""A simulated scenario as tables: one layout for terminal, CSV, HTML and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from rich.box import SIMPLE
from rich.table import Table

from pals_ray.plots.tables import Json, percent, seconds, table
from pals_ray.simulation.results.figures import PALS_UNDER_TARGET


def gain(value: float | None) -> str:
    """A gain in percent, with its sign."""
    return percent(value, "+z.1f")


def gain_with_width(found: Json) -> str:
    """A mean gain, and half its confidence interval where there is one."""
    width = found["half_width"]
    return gain(found["mean"]) + ("" if width is None else f" ± {100 * width:.1f}")


def precise(value: float | None) -> str:
    """A share in percent to two digits."""
    return percent(value, "z.2f")


#: A figure of every policy by its name in a summary: its title, and how it is written.
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "tokens_per_joule": ("tokens/J, node", "{:.3f}".format),
    "tokens_per_joule_gpu": ("tokens/J, GPU", "{:.3f}".format),
    "gain_over_static": ("gain over static, node", gain),
    "gain_over_static_gpu": ("gain over static, GPU", gain),
    "gain_over_static_counted": ("counted gain, node", gain),
    "gain_over_static_gpu_counted": ("counted gain, GPU", gain),
    "share_of_oracle_gain": ("counted gain / oracle's", percent),
    "attainment": ("attainment", precise),
    "late_rate": ("late requests", precise),
    "under_target_rate": ("intervals under target", percent),
    **{key: (f"time under target, {length_s:g} s", percent) for key, length_s in PALS_UNDER_TARGET.items()},
    "tokens_per_s": ("tokens/s", "{:.0f}".format),
    "goodput_tokens_per_s": ("goodput, tokens/s", "{:.0f}".format),
    "goodput_tokens_per_joule": ("goodput, tokens/J, node", "{:.3f}".format),
    "ttft_p50_s": ("TTFT p50", seconds),
    "ttft_p99_s": ("TTFT p99", seconds),
    "itl_p50_s": ("ITL p50", seconds),
    "itl_p99_s": ("ITL p99", seconds),
    "tracking_error": ("relative tracking error", percent),
    "aqa_error": ("AQA error", "{:.3f}".format),
    "pjm_score": ("PJM score", "{:.3f}".format),
    "precision": ("precision", "{:.3f}".format),
    "over_budget_s": ("drawn over budget, worst case", "{:.1f} s".format),
    "over_budget_max_w": ("over budget by, worst", "{:.0f} W".format),
    "settle_s": ("settling after a cut, longest", "{:.2f} s".format),
    "settle_over_w": ("over during it, most", "{:.0f} W".format),
    "stranded_w": ("stranded", "{:.0f} W".format),
    "binding_share": ("caps bind", percent),
    "decisions_per_min": ("decisions/min, replica", "{:.1f}".format),
    "cap_changes_per_min": ("cap changes/min, replica", "{:.1f}".format),
}


#: The same of parts of a fleet, where it has several.
PARTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("attainment_by_model", "attainment of", precise),
    ("attainment_by_priority", "attainment, priority", precise),
    ("goodput_tokens_per_s_by_priority", "goodput, tokens/s, priority", "{:.0f}".format),
)


def policy_rows(policies: Json) -> list[tuple[str, ...]]:
    """(title, a cell for each policy) of every figure that any policy has."""
    out = []
    for key, (title, write) in FIGURES.items():
        values = [entry.get(key) for entry in policies.values()]
        if any(value is not None for value in values):
            out.append((title, *("-" if value is None else write(value) for value in values)))
    for key, title, write in PARTS:
        names = dict.fromkeys(name for entry in policies.values() for name in entry.get(key, {}))
        if len(names) > 1:
            for name in names:
                values = [entry.get(key, {}).get(name) for entry in policies.values()]
                out.append((f"{title} {name}", *("-" if value is None else write(value) for value in values)))
    return out


def terminal_table(summary: Json, title: str) -> Table:
    """Figures down, policies across."""
    policies = summary["policies"]
    rows = policy_rows(policies)
    return table(["", *policies], rows, left=("",), box=SIMPLE, title=title, title_justify="left", pad_edge=False)


CASE_COLUMNS = ("case", "fleet", "gpu", "kind", "limit_set", "load", "target", "demand", "budget", "budget_share")


def cases_csv(cases: Sequence[Json]) -> str:
    """Every figure of every case and policy, a row each; SI units and fractions."""
    keys = list(cases[0]["policies"]["static"]["figures"])
    text = io.StringIO()
    writer = csv.writer(text)
    gains = ("gain_over_static", "gain_over_static_gpu")
    own = ("share_of_oracle_gain", "pooled_attainment", "counts")
    writer.writerow([*CASE_COLUMNS, "policy", *gains, *own, *keys])
    for case in cases:
        for name, entry in case["policies"].items():
            known = [*(case[column] for column in CASE_COLUMNS), name, *(entry[key]["mean"] for key in gains)]
            writer.writerow([*known, *map(entry.get, own), *map(entry["figures"].get, keys)])
    return text.getvalue()


def case_rows(cases: Sequence[Json]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a case each: gain and attainment of every policy."""
    names = list(dict.fromkeys(name for case in cases for name in case["policies"] if name != "static"))
    head = ["case", "static tokens/J", "static attainment", *(f"{name}: gain node / GPU, attainment" for name in names)]
    rows = []
    for case in cases:
        static = case["policies"]["static"]
        tokens_per_joule = static["figures"]["tokens_per_joule"]
        cells = [case["case"], f"{tokens_per_joule:.3f}", precise(static["pooled_attainment"])]
        rows.append([*cells, *(_case_cell(case["policies"].get(name)) for name in names)])
    return head, rows


def _case_cell(entry: Json | None) -> str:
    if entry is None:
        return "-"
    gains = f"{gain_with_width(entry['gain_over_static'])} / {gain(entry['gain_over_static_gpu']['mean'])}"
    mark = "" if entry["counts"] else " (does not count)"
    return f"{gains}, {precise(entry['pooled_attainment'])}{mark}"
