"""Commands on a running fleet: its status, its budget, what is wanted of its models, its policies, and its end."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter
from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live

import pals_ray
from pals_ray.cli.options import AsJson
from pals_ray.cli.status_table import budget_line, source_line, status_view, target_text
from pals_ray.config.policy_path import list_policies
from pals_ray.control.manager.slo_accounts import unreachable
from pals_ray.plots.tables import table
from pals_ray.types import BudgetSource, FleetStatus

NO_LIMIT = "none"
budget = typer.Typer(help="Show or set the fleet's budget, W, or have it moved.")
console = Console()


def status(
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second until Ctrl-C.")] = False,
) -> None:
    """Budget, charge and draw; each replica's operating point and reason; how each model keeps its SLO."""
    # Ray prints warnings about its cluster to stdout, which is for what was asked.
    with redirect_stdout(sys.stderr):
        fleet = pals_ray.connect()
        seen = fleet.status()
    if as_json:
        print(TypeAdapter(FleetStatus).dump_json(seen, indent=2).decode())
        return
    if not watch:
        console.print(status_view(seen))
        return
    with Live(status_view(seen), console=console, screen=True) as live:
        while True:
            time.sleep(1)
            live.update(status_view(fleet.status()))


def stop() -> None:
    """Delete our Serve applications, wait for their engines, restore every limit and end the manager."""
    pals_ray.connect().stop()
    console.print("stopped: engines gone, limits restored")


@budget.command()
def show() -> None:
    """What may be drawn, what is charged, what is drawn, and what moves the budget."""
    status = pals_ray.connect().status()
    console.print(budget_line(status))
    console.print(source_line(status.source))


@budget.command("set")
def set_(
    budget_w: Annotated[float, typer.Argument(help="Watts at node level: all managed GPUs plus overhead.")],
) -> None:
    """Set the budget, and end a schedule or followed signal; returns when every cap is in force."""
    change = pals_ray.connect().set_budget(budget_w)
    settled_ms = change.settled_s * 1000
    console.print(f"budget {change.before_w:g} -> {change.budget_w:g} W, every cap in force after {settled_ms:.0f} ms")
    if change.ended is not None:
        console.print(f"{change.ended} has ended")


@budget.command()
def schedule(
    file: Annotated[Path, typer.Argument(help="YAML or JSON: entries of budget_w, start, end, ramp_s.")],
) -> None:
    """Have a schedule move the budget until the next `pals budget set`."""
    _say(pals_ray.connect().schedule_budget(file))


@budget.command()
def follow(
    file: Annotated[Path, typer.Argument(help="CSV: a signal in [-1, 1], with or without a column of times.")],
    base_w: Annotated[float, typer.Option("--base", help="Watts that the fleet draws where the signal is 0.")],
    range_w: Annotated[float, typer.Option("--range", help="Watts that the signal moves it by, up and down.")],
    ceiling_w: Annotated[float, typer.Option("--ceiling", help="Watts that the budget never passes.")],
) -> None:
    """Have the fleet's draw follow a signal from now on, until the next `pals budget set`."""
    _say(pals_ray.connect().follow_signal(file, base_w=base_w, range_w=range_w, ceiling_w=ceiling_w))


def _say(source: BudgetSource) -> None:
    console.print(source_line(source))
    if source.warning is not None:
        console.print(f"! {source.warning}", style="yellow", highlight=False)


def target(
    model: Annotated[str, typer.Argument(help="The model's id.")],
    ttft: Annotated[str | None, typer.Option(help="SLO: time to first token, s; none: no limit.")] = None,
    tpot: Annotated[str | None, typer.Option(help="SLO: time per output token, s; none: no limit.")] = None,
    attainment: Annotated[float | None, typer.Option(help="SLO: share of requests that keep both, as 0.99.")] = None,
    window: Annotated[float | None, typer.Option(help="SLO: over how many s that share is taken.")] = None,
    itl_p99: Annotated[str | None, typer.Option(help="Gaps between tokens, s, at p99; none: no limit.")] = None,
    throughput: Annotated[str | None, typer.Option(help="Output tokens/s, all replicas; none: all demand.")] = None,
    priority: Annotated[int | None, typer.Option(help="Class; a lower number is served first.")] = None,
    min_share: Annotated[float | None, typer.Option(help="Share of the target kept while higher classes lack.")] = None,
    ttft_p99: Annotated[str | None, typer.Option(hidden=True)] = None,  # of earlier versions: refused by name
) -> None:
    """Change what is wanted of a model; what is not given stays as it is."""
    limits = {
        "ttft_s": ttft,
        "tpot_s": tpot,
        "itl_p99_s": itl_p99,
        "throughput_tokens_per_s": throughput,
        "ttft_p99_s": ttft_p99,
    }
    numbers = {"attainment": attainment, "window_s": window, "priority": priority, "min_share": min_share}
    changes = {name: _limit(value) for name, value in limits.items() if value is not None}
    changes |= {name: value for name, value in numbers.items() if value is not None}
    fleet = pals_ray.connect()
    console.print(f"{model}: {target_text(fleet.set_target(model, **changes))}", highlight=False)
    for row in fleet.status().slos:
        if row.model == model and (note := unreachable(row)) is not None:
            console.print(f"! {note}", style="yellow", highlight=False)


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
    headers = ("", "policy", "what it does")
    rows = (("in use" if policy.in_use else "", policy.path, policy.summary) for policy in found)
    console.print(table(headers, rows, left=headers, box=SIMPLE, pad_edge=False))
    if not any(policy.in_use for policy in found):
        console.print("no fleet runs here; `policy:` in the fleet file chooses one of these, or a function of your own")
