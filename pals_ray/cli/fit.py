"""`pals fit`: fit a power-performance model to a table of measurements, and say how good it is."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pals_ray.errors import PalsError
from pals_ray.models.fitting.accuracy import QUANTITIES, Evaluation, errors_of, evaluate_chosen, leave_batches_out
from pals_ray.models.fitting.fitted_surface import fit_surface
from pals_ray.models.fitting.sample_checks import SampleError, SampleTable, samples_from_columns
from pals_ray.models.lookup import SurfaceModel
from pals_ray.models.profile import Profile, samples_of
from pals_ray.models.specs import ModelSpec, UnknownSpecError, find_model
from pals_ray.types import Provenance


def read_samples(path: Path) -> SampleTable:
    """Read a CSV file of samples. Raises `SampleError` naming the file's line that is wrong."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            names = [name.strip() for name in reader.fieldnames or [] if name is not None]
            reader.fieldnames = names
            lines, rows = [], []
            for row in reader:
                if any((v or "").strip() for v in row.values() if not isinstance(v, list)):
                    lines.append(reader.line_num)
                    rows.append(row)
    except FileNotFoundError:
        raise SampleError(f"{path} does not exist: give a CSV file of samples") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SampleError(f"{path} cannot be read as CSV: {error}") from error
    if not rows:
        raise SampleError(f"{path} has no rows: the first line names the columns, each further line is a measurement")
    for line, row in zip(lines, rows, strict=True):
        if None in row or any(value is None for value in row.values()):
            raise SampleError(f"{path}, row {line}: it has not as many cells as the header has columns")
    try:
        return samples_from_columns({name: [row[name] for row in rows] for name in names}, lines)
    except SampleError as error:
        raise SampleError(f"{path}: {error}") from error


def summary(evaluation: Evaluation) -> dict[str, float | int | None]:
    """What `--json` prints: counts, and mean absolute relative errors as fractions (null where not measured)."""
    errors = {f"{quantity}_mape": evaluation.mape(quantity) for quantity in QUANTITIES}
    return {"n_train": evaluation.n_train, "n_test": evaluation.n_test, **errors}


def fit(
    samples: Annotated[
        Path, typer.Argument(help="CSV: power_cap_w, batch_limit, throughput_tokens_per_s, power_w, ...")
    ],
    train_points: Annotated[
        int | None,
        typer.Option("--train-points", help="Fit only the N points the profiler would choose; test the rest."),
    ] = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Leave each inner batch limit out in turn and test on it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the profile here.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a PNG of the surfaces here.")] = None,
    model: Annotated[str, typer.Option("--model", help="Name of the model; a known MoE adds its experts' law.")] = "",
    gpu: Annotated[str, typer.Option("--gpu", help="Name of the GPU, for the profile.")] = "",
) -> None:
    """Fit a model to measured (cap, batch) points and report its error on points it was not shown."""
    try:
        _fit(samples, train_points, leave_one_out, as_json, out, plot, model, gpu)
    except PalsError as error:
        typer.echo(f"pals fit: {error}", err=True)
        raise typer.Exit(1) from error


def _fit(
    samples: Path,
    train_points: int | None,
    leave_one_out: bool,
    as_json: bool,
    out: Path | None,
    plot: Path | None,
    model: str,
    gpu: str,
) -> None:
    if train_points is not None and leave_one_out:
        raise SampleError("--train-points and --leave-one-out are two different tests: give one of them")
    table = read_samples(samples)
    spec, notes = _spec_of(model)
    if out is not None and not gpu:
        notes.append("the profile names no GPU, and a fleet takes only one of its own: say --gpu")
    fitted = table.merged()
    if train_points is not None:
        evaluation, surface, fitted = evaluate_chosen(table, train_points, spec)
    else:
        surface = fit_surface(table, spec)
        evaluation = leave_batches_out(table, spec) if leave_one_out else Evaluation(len(fitted), 0, {})
    if out is not None:
        _write(out, profile_of(fitted, surface, model or samples.stem, gpu or "unknown").to_json())
    if plot is not None:
        # matplotlib takes half a second to import: only who asks for a picture waits for it.
        from pals_ray.plots.models import plot_surface

        try:
            plot_surface(surface, fitted, plot, model or samples.stem)
        except (OSError, ValueError) as error:
            raise SampleError(f"cannot write the picture {plot}: {error}") from error
    if as_json:
        typer.echo(json.dumps(summary(evaluation)))
    else:
        _show(evaluation, surface, fitted)
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def _spec_of(model: str) -> tuple[ModelSpec | None, list[str]]:
    """What is known of a model, and what to say where that is nothing."""
    try:
        return (find_model(model) if model else None), []
    except UnknownSpecError:
        return None, [f"{model} is none of the models that are known, so nothing of its experts goes into the fit"]


def profile_of(table: SampleTable, surface: SurfaceModel, model: str, gpu: str) -> Profile:
    """A profile of rows from somebody's file: what they were measured with is not known, so only what it says."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Profile(
        model=model,
        gpu=gpu,
        tensor_parallel=table.num_gpus,
        num_gpus=table.num_gpus,
        created_at=now,
        samples=samples_of(table, Provenance.MEASURED),
    ).with_fit(surface)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise SampleError(f"cannot write {path}: {error.strerror}") from error


def _show(evaluation: Evaluation, surface: SurfaceModel, fitted: SampleTable) -> None:
    console = Console()
    on_fitted = errors_of(surface, fitted)
    grid = Table(title=f"{evaluation.n_train} points fitted, {evaluation.n_test} tested")
    grid.add_column("mean error")
    grid.add_column("on tested points", justify="right")
    grid.add_column("on fitted points", justify="right")
    for quantity in QUANTITIES:
        if quantity in on_fitted:
            tested = evaluation.mape(quantity)
            grid.add_row(quantity, "-" if tested is None else f"{tested:.1%}", f"{on_fitted[quantity].mean():.1%}")
    console.print(grid)
    for note in surface.report.notes():
        console.print(f"note: {note}", highlight=False)
