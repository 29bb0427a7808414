"""`pals target`, `pals policies` and `pals overhead`: what is wanted of a model, who divides, and a node's overhead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import pals_ray
from pals_ray.cli.status_table import target_text
from pals_ray.config.budget_files import load_node_samples
from pals_ray.config.policy_path import list_policies
from pals_ray.control.budget.overhead_fit import fit_overhead

NO_LIMIT = "none"
console = Console()


def target(
    model: Annotated[str, typer.Argument(help="The model's id.")],
    throughput: Annotated[str | None, typer.Option(help="Output tokens/s, all replicas; none: all demand.")] = None,
    ttft_p99: Annotated[str | None, typer.Option(help="Time to first token, s, at p99; none: no limit.")] = None,
    itl_p99: Annotated[str | None, typer.Option(help="Inter-token latency, s, at p99; none: no limit.")] = None,
    priority: Annotated[int | None, typer.Option(help="Class; a lower number is served first.")] = None,
    min_share: Annotated[float | None, typer.Option(help="Share of the target kept while higher classes lack.")] = None,
) -> None:
    """Change what is wanted of a model; what is not given stays as it is."""
    given = {"throughput_tokens_per_s": throughput, "ttft_p99_s": ttft_p99, "itl_p99_s": itl_p99}
    changes = {name: _limit(value) for name, value in given.items() if value is not None}
    changes |= {name: value for name, value in (("priority", priority), ("min_share", min_share)) if value is not None}
    console.print(f"{model}: {target_text(pals_ray.connect().set_target(model, **changes))}")


def _limit(value: str) -> float | None:
    if value == NO_LIMIT:
        return None
    try:
        return float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a number nor {NO_LIMIT!r}") from None


def policies() -> None:
    """List the allocation policies, and say which one the fleet uses."""
    try:
        found = pals_ray.connect().policies()
    except pals_ray.NotRunning:
        found = list_policies()
    table = Table(box=SIMPLE, pad_edge=False)
    for header in ("", "policy", "what it does"):
        table.add_column(header)
    for policy in found:
        table.add_row("in use" if policy.in_use else "", policy.path, policy.summary)
    console.print(table)
    if not any(policy.in_use for policy in found):
        console.print("no fleet runs here; `policy:` in the fleet file chooses one of these, or a function of your own")


def overhead(
    file: Annotated[Path, typer.Argument(help="CSV: node_w and gpu_w (all GPUs together), at idle and under load.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Fit a node's overhead a + b x GPU watts to measurements, for the fleet file."""
    fit = fit_overhead(load_node_samples(file))
    found = {"a_w": round(fit.overhead.a_w, 2), "b": round(fit.overhead.b, 5)}
    if as_json:
        print(json.dumps({**found, "residual_w": fit.residual_w, "left_out_rows": fit.left_out}))
        return
    console.print(f"overhead: {{a_w: {found['a_w']:g}, b: {found['b']:g}}}", highlight=False)
    console.print(f"# leaves {fit.residual_w:.1f} W (standard deviation) unexplained", highlight=False)
    if fit.left_out:
        console.print(f"# too far off to count: lines {', '.join(map(str, fit.left_out))}", highlight=False)
