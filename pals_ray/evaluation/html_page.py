"""One self-contained HTML page of a simulated scenario: setup, tables, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pals_ray.config.scenario import Scenario
from pals_ray.evaluation.policy_tables import case_rows, policy_rows
from pals_ray.plots.tables import Json

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: 3px 10px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
th { background: #f4f4f4 }
img { max-width: 100%; margin: .5rem 0; border: 1px solid #eee }
.note { color: #555 }
"""


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of escaped cells."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def setup_lines(scenario: Scenario, trace: str) -> list[str]:
    """What was run, in sentences."""
    overhead = scenario.overhead
    limits = (
        f"{name}: TTFT {1000 * limit.ttft_s:g} ms, TPOT {1000 * limit.tpot_s:g} ms"
        for name, limit in scenario.limits.items()
    )
    return [
        f"Requests: {trace}; arrivals: {scenario.trace.arrivals}; {scenario.duration_s:g} s simulated.",
        f"Node level is GPU watts plus {overhead.a_w:g} W + {overhead.b:g} x GPU watts for {overhead.gpus} GPUs: "
        f"{overhead.source.strip()}",
        f"Limits ({'; '.join(limits)}; some models have others). A gain counts where at least "
        f"{100 * scenario.least_attainment:g} % of the requests of all seeds are good, or as many as static's.",
        "GPUs, power and step times are modelled, requests are as in the trace; the control code is the deployed one.",
    ]


def html_report(scenario: Scenario, trace: str, summary: Json, pictures: Sequence[tuple[str, Path]]) -> str:
    """The page, with the pictures (title, PNG) inside it."""
    head, rows = case_rows(summary["cases"])
    parts = [
        f"<h1>{escape(scenario.name)}</h1>",
        f"<p>{escape(scenario.about)}</p>",
        *(f"<p class=note>{escape(line)}</p>" for line in setup_lines(scenario, trace)),
        "<h2>Policies</h2>",
        "<p class=note>Means over cases; the worst case for budgets and settling.</p>",
        html_table(["", *summary["policies"]], policy_rows(summary["policies"])),
    ]
    for title, picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{data}">')
    parts += ["<h2>Cases</h2>", html_table(head, rows)]
    title = escape(f"pals simulate: {scenario.name}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
