"""`pals profile`: measure a model of the running fleet at a few operating points, and fit its surfaces to them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import pals_ray
from pals_ray.profiling.live_profile import profile_live
from pals_ray.profiling.load import RequestShape


def profile(
    model: Annotated[str, typer.Argument(help="A deployed model with one replica.")],
    points: Annotated[int, typer.Option(help="How many operating points to measure.", min=4)] = 12,
    out: Annotated[Path | None, typer.Option(help="The profile's file; a PNG goes beside it.")] = None,
    check: Annotated[int, typer.Option(help="Then measure N points drawn at random, to check the fit.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the points to check, and of the load's lengths.")] = 0,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt of the load.", min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(help="Mean output tokens of the load's requests.", min=2)] = 64,
    url: Annotated[str, typer.Option(help="Where the fleet serves.")] = "http://127.0.0.1:8000",
) -> None:
    """Measure a replica at operating points chosen one after another, under a load of its own, and fit its model.

    The replica is held at each point, inside the budget, for this load alone; whatever happens to this command, the
    fleet has it back within seconds. An interrupted run goes on where it was when started again with the same --out.
    """
    pals_ray.connect()
    path = out or Path(f"{model.replace('/', '-')}.profile.json")
    shape = RequestShape(prompt_tokens, output_tokens)
    asyncio.run(profile_live(model, points, path, check, seed, shape, url, Console(highlight=False)))
