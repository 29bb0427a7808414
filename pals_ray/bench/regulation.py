"""`pals bench regulation`: how well a real fleet's draw follows a regulation signal."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pals_ray.bench.served_fleet import UNCAPPED_BUDGET_W, URL, ServedFleet, Watch, served_fleet, watch
from pals_ray.control.budget.regulation import (
    FloatArray,
    RegulationError,
    RegulationScore,
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


@dataclass(frozen=True, slots=True)
class Followed:
    """What was asked and what was drawn, W, in 10 s means (n,), and the score of it (None: too short to score)."""

    base_w: float
    range_w: float
    ceiling_w: float
    target_w: FloatArray
    drawn_w: FloatArray
    score: RegulationScore | None

    @property
    def tracking_error(self) -> float:
        """Mean absolute error over the mean target."""
        return float(np.mean(np.abs(self.drawn_w - self.target_w)) / np.mean(self.target_w))


def run(minutes: float, plot: Path, seed: int) -> Report:
    """Load the default fleet in full, have it follow a synthetic signal, and draw what came of it."""
    signal = synthetic_signal(60.0 * minutes, seed)
    with served_fleet() as served:
        followed = asyncio.run(_follow(served, signal))
    from pals_ray.plots.models import plot_following  # matplotlib, which no other command waits for

    plot_following(followed.target_w, followed.drawn_w, 10.0, _title(followed), plot)
    found = figures(followed)
    shown = table(
        ("figure", "value"),
        ((name, f"{value:.4g}") for name, value in found.items()),
        left=("figure",),
        title=f"{minutes:g} min: {followed.base_w:.0f} W +- {followed.range_w:.0f} W, virtual GPUs (modelled)",
    )
    short = ["too short for a score: follow for 10 minutes at least"] if followed.score is None else []
    return Report(found, shown, *short, f"picture: {plot}")


def figures(followed: Followed) -> dict[str, float]:
    """The figures of the JSON object: errors and scores as fractions."""
    watts = {name: getattr(followed, name) for name in ("base_w", "range_w", "ceiling_w")}
    scores = {} if followed.score is None else asdict(followed.score)
    return {**watts, "samples": len(followed.drawn_w), "tracking_error": followed.tracking_error, **scores}


async def _follow(served: ServedFleet, signal: Signal) -> Followed:
    await served.fleet.set_budget_async(UNCAPPED_BUDGET_W)
    async with loaded(*(ClosedLoop(URL, model, STREAMS, SHAPE) for model in served.model_ids)):
        await asyncio.sleep(SETTLE_S)
        natural_w = (await watch(served, UNCAPPED_S)).mean_w
        base_w = BASE_SHARE * natural_w
        watts = {"base_w": base_w, "range_w": RANGE_SHARE * base_w, "ceiling_w": CEILING_SHARE * natural_w}
        await served.fleet.set_budget_async(base_w)
        await asyncio.sleep(SETTLE_S)
        started = asyncio.create_task(served.fleet.follow_signal_async(signal, **watts))
        seen = await watch(served, signal.end_s)
        await started
    return judge(signal, seen, **watts)


def judge(signal: Signal, seen: Watch, *, base_w: float, range_w: float, ceiling_w: float) -> Followed:
    """10 s means of draw against the raw signal, from the watch's first look on."""
    time_s = np.array(seen.time_s) - seen.time_s[0]
    power_w = np.diff(seen.energy_j) / np.diff(seen.time_s)
    drawn_w = sample_means(time_s[:-1], power_w, 0.0, time_s[-1])
    y = sample_means(signal.time_s, signal.value, 0.0, time_s[-1])[: len(drawn_w)]
    try:
        scored = score(y, drawn_w, base_w, range_w)
    except RegulationError:
        scored = None
    return Followed(base_w, range_w, ceiling_w, base_w + range_w * y, drawn_w, scored)


def _title(followed: Followed) -> str:
    words = f"Base {followed.base_w:.0f} W, range {followed.range_w:.0f} W: error {followed.tracking_error:.1%}"
    return words if followed.score is None else f"{words}, precision {followed.score.precision:.2f}"
