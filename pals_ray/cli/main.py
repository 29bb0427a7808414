"""`pals`: look at a running fleet and move it."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from typing import Annotated

import typer
from pydantic import TypeAdapter
from rich.console import Console
from rich.live import Live

import pals_ray
from pals_ray.bench.allocator import allocator
from pals_ray.bench.evaluation import evaluation
from pals_ray.bench.models import models
from pals_ray.bench.overhead import overhead as bench_overhead
from pals_ray.bench.policies import policies as bench_policies
from pals_ray.bench.reaction import reaction
from pals_ray.bench.regulation import regulation
from pals_ray.bench.simulation import simulation
from pals_ray.cli import budget
from pals_ray.cli.fit import fit
from pals_ray.cli.operate import overhead, policies, target
from pals_ray.cli.profile import profile
from pals_ray.cli.simulate import simulate
from pals_ray.cli.status_table import status_view
from pals_ray.cli.validate_simulation import validate_simulation
from pals_ray.errors import PalsError
from pals_ray.types import FleetStatus

app = typer.Typer(help="Power-aware LLM serving on Ray: one budget of watts for a fleet of vLLM replicas.")
bench_app = typer.Typer(help="Measure what pals-ray itself costs and gains.")
app.add_typer(budget.app, name="budget")
app.add_typer(bench_app, name="bench")
bench_app.command()(allocator)
bench_app.command()(evaluation)
bench_app.command()(models)
bench_app.command("overhead")(bench_overhead)
bench_app.command("policies")(bench_policies)
bench_app.command()(reaction)
bench_app.command()(regulation)
bench_app.command()(simulation)
app.command()(fit)
app.command()(overhead)
app.command()(policies)
app.command()(profile)
app.command()(simulate)
app.command()(target)
app.command()(validate_simulation)

STATUS_JSON = TypeAdapter(FleetStatus)
console = Console()


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second until Ctrl-C.")] = False,
) -> None:
    """Budget, charge and draw; each replica's operating point, target and reason."""
    # Ray prints warnings about its cluster to stdout, which is for what was asked.
    with redirect_stdout(sys.stderr):
        fleet = pals_ray.connect()
        seen = fleet.status()
    if as_json:
        print(STATUS_JSON.dump_json(seen, indent=2).decode())
        return
    if not watch:
        console.print(status_view(seen))
        return
    with Live(status_view(seen), console=console, screen=True) as live:
        while True:
            time.sleep(1)
            live.update(status_view(fleet.status()))


@app.command()
def stop() -> None:
    """Delete our Serve applications, wait for their engines, restore every limit and end the manager."""
    pals_ray.connect().stop()
    console.print("stopped: engines gone, limits restored")


def main() -> None:
    """Run `pals`; our own errors become one line on stderr and exit code 1."""
    try:
        app()
    except PalsError as error:
        Console(stderr=True).print(f"[red]pals:[/red] {error}", highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
