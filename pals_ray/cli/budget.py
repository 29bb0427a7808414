"""`pals budget`: show the fleet's budget, set it, or have a schedule or a signal move it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import pals_ray
from pals_ray.cli.status_table import budget_line, source_line
from pals_ray.types import BudgetSource

app = typer.Typer(help="Show or set the fleet's budget, W, or have it moved.")
console = Console()


@app.command()
def show() -> None:
    """What may be drawn, what is charged, what is drawn, and what moves the budget."""
    status = pals_ray.connect().status()
    console.print(budget_line(status))
    console.print(source_line(status.source))


@app.command("set")
def set_(
    budget_w: Annotated[float, typer.Argument(help="Watts at node level: all managed GPUs plus overhead.")],
) -> None:
    """Set the budget, and end a schedule or followed signal; returns when every cap is in force."""
    change = pals_ray.connect().set_budget(budget_w)
    settled_ms = change.settled_s * 1000
    console.print(f"budget {change.before_w:g} -> {change.budget_w:g} W, every cap in force after {settled_ms:.0f} ms")
    if change.ended is not None:
        console.print(f"{change.ended} has ended")


@app.command()
def schedule(
    file: Annotated[Path, typer.Argument(help="YAML or JSON: entries of budget_w, start, end, ramp_s.")],
) -> None:
    """Have a schedule move the budget until the next `pals budget set`."""
    _say(pals_ray.connect().schedule_budget(file))


@app.command()
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
