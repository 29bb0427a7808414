"""`pals`: every command, and how our own errors are shown."""

from __future__ import annotations

import typer
from rich.console import Console

from pals_ray.cli import bench
from pals_ray.cli.fit import fit, overhead
from pals_ray.cli.profile import profile
from pals_ray.cli.running_fleet import budget, policies, status, stop, target
from pals_ray.cli.simulate import simulate, validate_simulation
from pals_ray.errors import PalsError

app = typer.Typer(help="Power-aware LLM serving on Ray: one budget of watts for a fleet of vLLM replicas.")
app.add_typer(budget, name="budget")
app.add_typer(bench.app, name="bench")
for command in (fit, overhead, policies, profile, simulate, target, validate_simulation, status, stop):
    app.command()(command)


def main() -> None:
    """Run `pals`; our own errors become one line on stderr and exit code 1."""
    try:
        app()
    except PalsError as error:
        Console(stderr=True).print(f"[red]pals:[/red] {error}", highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
