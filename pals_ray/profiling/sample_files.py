"""Measurements from a CSV file: read, made into a profile, and what a fit of them is off by."""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from pathlib import Path

from pals_ray.models.fitting.accuracy import QUANTITIES, Evaluation, errors_of
from pals_ray.models.fitting.sample_checks import SampleError, SampleTable, samples_from_columns
from pals_ray.models.lookup import SurfaceModel
from pals_ray.models.profile import Profile, samples_of
from pals_ray.plots.tables import Report, table
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


def profile_of(table: SampleTable, surface: SurfaceModel, model: str, gpu: str) -> Profile:
    """A profile of rows from somebody's file: what they were measured with is not known, so only what it says."""
    return Profile(
        model=model,
        gpu=gpu,
        tensor_parallel=table.num_gpus,
        num_gpus=table.num_gpus,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        samples=samples_of(table, Provenance.MEASURED),
    ).with_fit(surface)


def error_report(evaluation: Evaluation, surface: SurfaceModel, fitted: SampleTable) -> Report:
    """Counts, and mean absolute relative errors as fractions (None where not measured)."""
    tested = {quantity: evaluation.mape(quantity) for quantity in QUANTITIES}
    on_fitted = errors_of(surface, fitted)
    rows = (
        (name, "-" if (error := tested[name]) is None else f"{error:.1%}", f"{on_fitted[name].mean():.1%}")
        for name in QUANTITIES
        if name in on_fitted
    )
    title = f"{evaluation.n_train} points fitted, {evaluation.n_test} tested"
    shown = table(("mean error", "on tested points", "on fitted points"), rows, left=("mean error",), title=title)
    figures = {f"{name}_mape": error for name, error in tested.items()}
    notes = (f"note: {note}" for note in surface.report.notes())
    return Report({"n_train": evaluation.n_train, "n_test": evaluation.n_test, **figures}, shown, *notes)
