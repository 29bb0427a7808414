"""`pals bench regulation`: how well a real fleet's draw follows a regulation signal."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pals_ray.bench.served_fleet import UNCAPPED_BUDGET_W, URL, ServedFleet, Watch, served_fleet, watch
from pals_ray.control.budget.regulation import (
    FloatArray,
    RegulationError,
    Signal,
    sample_means,
    score,
    synthetic_signal,
)
from pals_ray.plots.tables import Report, table
from pals_ray.profiling.load import ClosedLoop, RequestShape, loaded

RANGE_SHARE = 0.15
#: The base, as a share of what the loaded fleet draws uncapped: a cap cannot raise draw, so base + range stay under it.
BASE_SHARE = 0.8
CEILING_SHARE = 1.15
UNCAPPED_S, SETTLE_S = 30.0, 10.0
STREAMS, SHAPE = 32, RequestShape(prompt_tokens=64, output_tokens=192)


#: Figures (errors and scores as fractions), then what was asked and what was drawn, W, in 10 s means (n,).
Followed = tuple[dict[str, float], FloatArray, FloatArray]


def run(minutes: float, plot: Path, seed: int) -> Report:
    """Load the default fleet in full, have it follow a synthetic signal, and draw what came of it."""
    signal = synthetic_signal(60.0 * minutes, seed)
    with served_fleet() as served:
        found, target_w, drawn_w = asyncio.run(_follow(served, signal))
    from pals_ray.plots.models import plot_following  # matplotlib, which no other command waits for

    plot_following(target_w, drawn_w, 10.0, _title(found), plot)
    shown = table(
        ("figure", "value"),
        ((name, f"{value:.4g}") for name, value in found.items()),
        left=("figure",),
        title=f"{minutes:g} min: {found['base_w']:.0f} W +- {found['range_w']:.0f} W, virtual GPUs (modelled)",
    )
    short = ["too short for a score: follow for 10 minutes at least"] if "precision" not in found else []
    return Report(found, shown, *short, f"picture: {plot}")


async def _follow(served: ServedFleet, signal: Signal) -> Followed:
    await served.fleet.set_budget_async(UNCAPPED_BUDGET_W)
    async with loaded(*(ClosedLoop(URL, model, STREAMS, SHAPE) for model in served.model_ids)):
        await asyncio.sleep(SETTLE_S)
        natural_w, *_ = (await watch(served, UNCAPPED_S)).rates()
        base_w = BASE_SHARE * natural_w
        watts = {"base_w": base_w, "range_w": RANGE_SHARE * base_w, "ceiling_w": CEILING_SHARE * natural_w}
        await served.fleet.set_budget_async(base_w)
        await asyncio.sleep(SETTLE_S)
        started = asyncio.create_task(served.fleet.follow_signal_async(signal, **watts))
        seen = await watch(served, signal.end_s)
        await started
    return judge(signal, seen, **watts)


def judge(signal: Signal, seen: Watch, *, base_w: float, range_w: float, ceiling_w: float) -> Followed:
    """10 s means of draw against the raw signal, from the watch's first look on. Too short a run has no score."""
    time_s = np.array(seen.time_s) - seen.time_s[0]
    power_w = np.diff(seen.energy_j) / np.diff(seen.time_s)
    drawn_w = sample_means(time_s[:-1], power_w, 0.0, time_s[-1])
    y = sample_means(signal.time_s, signal.value, 0.0, time_s[-1])[: len(drawn_w)]
    target_w = base_w + range_w * y
    figures = {"base_w": base_w, "range_w": range_w, "ceiling_w": ceiling_w, "samples": len(drawn_w)}
    figures["tracking_error"] = float(np.mean(np.abs(drawn_w - target_w)) / np.mean(target_w))
    with suppress(RegulationError):
        figures |= asdict(score(y, drawn_w, base_w, range_w))
    return figures, target_w, drawn_w


def _title(found: dict[str, float]) -> str:
    words = f"Base {found['base_w']:.0f} W, range {found['range_w']:.0f} W: error {found['tracking_error']:.1%}"
    return f"{words}, precision {found['precision']:.2f}" if "precision" in found else words
