"""A simulated scenario as tables: one layout for terminal, CSV, HTML and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of every policy: its name in a summary, its title, and how it is written."""

    key: str
    title: str
    write: Callable[[float], str]


def _percent(value: float) -> str:
    return f"{100 * value:z.1f} %"


def _gain(value: float) -> str:
    return f"{100 * value:+z.1f} %"


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def _of(form: str, unit: str = "") -> Callable[[float], str]:
    return lambda value: f"{value:{form}}{unit}"


ROWS = (
    Row("tokens_per_joule", "tokens/J, node", _of(".3f")),
    Row("tokens_per_joule_gpu", "tokens/J, GPU", _of(".3f")),
    Row("gain_over_static", "gain over static, node", _gain),
    Row("gain_over_static_gpu", "gain over static, GPU", _gain),
    Row("gain_over_static_counted", "counted gain, node", _gain),
    Row("gain_over_static_gpu_counted", "counted gain, GPU", _gain),
    Row("share_of_oracle_gain", "counted gain / oracle's", _percent),
    Row("violation_rate", "violations", _percent),
    Row("tokens_per_s", "tokens/s", _of(".0f")),
    Row("goodput_tokens_per_s", "goodput, tokens/s", _of(".0f")),
    Row("goodput_tokens_per_joule", "goodput, tokens/J, node", _of(".3f")),
    Row("ttft_p50_s", "TTFT p50", _seconds),
    Row("ttft_p99_s", "TTFT p99", _seconds),
    Row("itl_p50_s", "ITL p50", _seconds),
    Row("itl_p99_s", "ITL p99", _seconds),
    Row("tracking_error", "relative tracking error", _percent),
    Row("aqa_error", "AQA error", _of(".3f")),
    Row("pjm_score", "PJM score", _of(".3f")),
    Row("precision", "precision", _of(".3f")),
    Row("over_budget_s", "drawn over budget, worst case", _of(".1f", " s")),
    Row("over_budget_max_w", "over budget by, worst", _of(".0f", " W")),
    Row("settle_s", "settling after a cut, longest", _of(".2f", " s")),
    Row("settle_over_w", "over during it, most", _of(".0f", " W")),
    Row("stranded_w", "stranded", _of(".0f", " W")),
    Row("binding_share", "caps bind", _percent),
    Row("decisions_per_min", "decisions/min, replica", _of(".1f")),
    Row("cap_changes_per_min", "cap changes/min, replica", _of(".1f")),
)


def shown(policies: Json) -> list[tuple[str, list[str]]]:
    """(title, a cell for each policy) of every figure that any policy has."""
    out = []
    for row in ROWS:
        values = [entry.get(row.key) for entry in policies.values()]
        if any(value is not None for value in values):
            out.append((row.title, ["-" if value is None else row.write(value) for value in values]))
    for key, title in (("violations_by_model", "violations of"), ("violations_by_priority", "violations, priority")):
        names = dict.fromkeys(name for entry in policies.values() for name in entry.get(key, {}))
        if len(names) > 1:
            for name in names:
                values = [entry.get(key, {}).get(name) for entry in policies.values()]
                out.append((f"{title} {name}", ["-" if v is None else _percent(v) for v in values]))
    return out


def terminal_table(summary: Json, title: str) -> Table:
    """Figures down, policies across."""
    table = Table(box=SIMPLE, title=title, title_justify="left", pad_edge=False)
    table.add_column("")
    for name in summary["policies"]:
        table.add_column(name, justify="right")
    for head, cells in shown(summary["policies"]):
        table.add_row(head, *cells)
    return table


CASE_COLUMNS = ("case", "fleet", "gpu", "kind", "load", "budget", "budget_share")


def cases_csv(cases: Sequence[Json]) -> str:
    """Every figure of every case and policy, a row each; SI units and fractions."""
    keys = list(cases[0]["policies"]["static"]["figures"])
    text = io.StringIO()
    writer = csv.writer(text)
    gains = ("gain_over_static", "gain_over_static_gpu")
    writer.writerow([*CASE_COLUMNS, "policy", *gains, "share_of_oracle_gain", "counts", *keys])
    for case in cases:
        for name, entry in case["policies"].items():
            writer.writerow(
                [
                    *(case[column] for column in CASE_COLUMNS),
                    name,
                    *(entry[key]["mean"] for key in gains),
                    entry["share_of_oracle_gain"],
                    entry["counts"],
                    *(entry["figures"][key] for key in keys),
                ]
            )
    return text.getvalue()


def case_rows(cases: Sequence[Json]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a case each: load and limits, then gain and violations of every policy."""
    names = list(dict.fromkeys(name for case in cases for name in case["policies"] if name != "static"))
    head = ["case", "static tokens/J", "static violations", *(f"{name}: gain node / GPU, violations" for name in names)]
    rows = []
    for case in cases:
        static = case["policies"]["static"]["figures"]
        cells = [case["case"], f"{static['tokens_per_joule']:.3f}", _rate(static["violation_rate"])]
        for name in names:
            entry = case["policies"].get(name)
            cells.append("-" if entry is None else _case_cell(entry))
        rows.append(cells)
    return head, rows


def _case_cell(entry: Json) -> str:
    node, gpu = entry["gain_over_static"], entry["gain_over_static_gpu"]
    width = "" if node["half_width"] is None else f" ± {100 * node['half_width']:.1f}"
    mark = "" if entry["counts"] else " (does not count)"
    rate = _rate(entry["figures"]["violation_rate"])
    return f"{_gain(node['mean'])}{width} / {_gain(gpu['mean'])}, {rate}{mark}"


def _rate(value: float | None) -> str:
    return "-" if value is None else _percent(value)
