"""A profiling run: points are chosen one after another and written down each, so that an interrupted run goes on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np

from pals_ray.control.replica.batch_choice import graph_sizes
from pals_ray.errors import PalsError
from pals_ray.models.fitting.next_point import next_point
from pals_ray.models.profile import Profile, ProfileError, ProfileSample, profile_from_json
from pals_ray.models.specs import ModelSpec
from pals_ray.profiling.measure import NotSteady
from pals_ray.types import OperatingPoint
from pals_ray.whole_file import write_whole

_CAP_LEVELS = 7
#: One or two points may fail to become steady by chance; with the third the run ends.
_MOST_UNSTEADY = 3

Measure = Callable[[OperatingPoint], Awaitable[ProfileSample]]


def grid_of(min_cap_w: float, most_cap_w: float, max_batch: int) -> list[OperatingPoint]:
    """Seven caps, evenly, and batch limits 1, 2, 4, 8, 16, 24, 32, 48, 64, ... up to the largest."""
    caps = np.unique(np.linspace(min_cap_w, most_cap_w, _CAP_LEVELS).round())
    caps = caps[(caps >= min_cap_w) & (caps <= most_cap_w)]
    if len(caps) < 2:
        raise PalsError(
            f"caps from {min_cap_w:g} to {most_cap_w:g} W per GPU are all that the budget allows: too narrow to "
            "measure the effect of a cap; raise the budget for the time of measuring"
        )
    if max_batch < 2:
        raise PalsError("the engine was started with max_num_seqs 1: the effect of the batch cannot be measured")
    powers = [2**k for k in range(max_batch.bit_length())]
    batches = sorted({max_batch, *(b for p in powers for b in (p, p * 3 // 2) if b in graph_sizes(max_batch))})
    return [OperatingPoint(float(cap_w), batch) for cap_w in caps for batch in batches]


def drawn_points(min_cap_w: float, most_cap_w: float, max_batch: int, count: int, seed: int) -> list[OperatingPoint]:
    """Points drawn uniformly from all there are: caps in whole W, batch limits that an agent orders (graph sizes)."""
    draw = random.Random(seed)
    low, high = int(np.ceil(min_cap_w)), int(np.floor(most_cap_w))
    sizes = graph_sizes(max_batch)
    return [OperatingPoint(float(draw.randint(low, high)), draw.choice(sizes)) for _ in range(count)]


def begin_or_resume(path: Path, empty: Profile) -> Profile:
    """The profile at `path` so far, or `empty` where there is none.

    Raises `ProfileError` where the file is a profile of something else: another model, GPU, time scale, engine, load.
    """
    if not path.exists():
        return empty
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} cannot be read as a profile: {error}; name another file with --out") from error
    found = profile_from_json(text, str(path))
    for name in set(Profile.model_fields) - {"samples", "fit", "created_at"}:
        was, now = getattr(found, name), getattr(empty, name)
        if was != now:
            raise ProfileError(
                f"{path} holds a profile with {name} {was!r}, but this one has {now!r}: name another file with --out, "
                "or remove it"
            )
    return found


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile so that whoever is killed meanwhile leaves the old file or the new one. Raises `ProfileError`."""
    try:
        write_whole(path, profile.to_json())
    except OSError as error:
        raise ProfileError(f"the profile cannot be written to {path}: {error.strerror}; name another --out") from error


async def measure_all(
    profile: Profile,
    grid: Sequence[OperatingPoint],
    points: int,
    measure: Measure,
    keep: Callable[[Profile], None],
    spec: ModelSpec | None,
) -> tuple[Profile, tuple[str, ...]]:
    """Measure until the profile holds `points` samples, each chosen on what is known so far and kept at once.

    Returns the profile and what was left out because it did not become steady. Raises `PalsError`.
    """
    left_out: list[str] = []
    skipped: list[int] = []
    while len(profile.samples) < points:
        index = await asyncio.to_thread(_next, profile, grid, skipped, spec)
        if index is None:
            break
        try:
            sample = await measure(grid[index])
        except NotSteady as error:
            left_out.append(str(error))
            skipped.append(index)
            if len(skipped) >= _MOST_UNSTEADY:
                raise
            continue
        profile = profile.model_copy(update={"samples": (*profile.samples, sample), "fit": None})
        keep(profile)
    return profile, tuple(left_out)


def _next(profile: Profile, grid: Sequence[OperatingPoint], skipped: list[int], spec: ModelSpec | None) -> int | None:
    """The most informative point of the grid that is neither measured nor skipped, given all samples so far."""
    measured = [OperatingPoint(s.power_cap_w, s.batch_limit) for s in profile.samples]
    taken = [*skipped, *(grid.index(point) for point in measured if point in grid)]
    cap_w, batch = np.array([(point.cap_w, point.batch_limit) for point in grid]).T
    return next_point(cap_w, batch, taken, profile.table(), spec)
