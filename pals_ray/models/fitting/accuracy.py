"""How well a fit predicts points that were left out of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pals_ray.models.fitting.fitted_surface import fit_surface
from pals_ray.models.fitting.next_point import choose_points
from pals_ray.models.fitting.sample_checks import LATENCY_COLUMNS, SampleError, SampleTable
from pals_ray.models.lookup import SurfaceModel
from pals_ray.models.power_model import FloatArray, PowerModel
from pals_ray.models.specs import ModelSpec

#: Names of the quantities compared, in the order of reports.
QUANTITIES = ("throughput", "power", *(name.removesuffix("_s") for name in LATENCY_COLUMNS))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Absolute relative errors |predicted / measured - 1| by quantity (only those measured), over all test rows."""

    n_train: int
    n_test: int
    errors: dict[str, FloatArray]

    def mape(self, quantity: str) -> float | None:
        """Mean absolute relative error as a fraction; None where the quantity was not measured or nothing tested."""
        errors = self.errors.get(quantity)
        return float(errors.mean()) if errors is not None and len(errors) else None


def errors_of(model: PowerModel, table: SampleTable) -> dict[str, FloatArray]:
    """Absolute relative errors of a model on a table, by quantity; rows without a value are left out."""
    said = model.predict(table.cap_w, table.batch)
    pairs = {
        "throughput": (said.throughput_tokens_per_s, table.throughput_tokens_per_s),
        "power": (said.power_w, table.power_w),
    }
    for name, values in table.latency.items():
        pairs[name.removesuffix("_s")] = (getattr(said, name), values)
    out = {}
    for quantity, (predicted, measured) in pairs.items():
        known = np.isfinite(measured)
        out[quantity] = np.asarray(np.abs(predicted[known] / measured[known] - 1.0))
    return out


def evaluate_chosen(
    table: SampleTable, points: int, model: ModelSpec | None = None
) -> tuple[Evaluation, SurfaceModel, SampleTable]:
    """Fit the `points` cells that the profiler's rule chooses, test on all others.

    Returns the evaluation, the fitted model and the rows it was fitted to. Raises `SampleError`.
    """
    cells = table.merged()
    if not 4 <= points <= len(cells):
        raise SampleError(f"{points} training points asked, but the file has {len(cells)} cells and a fit needs 4")
    taken = choose_points(cells.cap_w, cells.batch, points, cells.take, model)
    chosen = cells.take(taken)
    others = cells.take([i for i in range(len(cells)) if i not in set(taken)])
    surface = fit_surface(chosen, model)
    errors = errors_of(surface, others) if len(others) else {}
    return Evaluation(len(chosen), len(others), errors), surface, chosen


def leave_batches_out(table: SampleTable, model: ModelSpec | None = None) -> Evaluation:
    """Leave each inner batch out in turn (all its rows), fit the rest, test on what was left out.

    `n_train` is the smallest number of rows that a fit saw. Raises `SampleError` with fewer than three batches.
    """
    cells = table.merged()
    batches = np.unique(cells.batch)
    if len(batches) < 3:
        raise SampleError(f"leave-one-out needs at least 3 batch limits, the file has {len(batches)}")
    parts: dict[str, list[FloatArray]] = {}
    seen, tested = len(cells), 0
    for batch in batches[1:-1]:
        out = np.flatnonzero(cells.batch == batch)
        rest = np.flatnonzero(cells.batch != batch)
        seen, tested = min(seen, len(rest)), tested + len(out)
        surface = fit_surface(cells.take(rest), model)
        for quantity, errors in errors_of(surface, cells.take(out)).items():
            parts.setdefault(quantity, []).append(errors)
    return Evaluation(seen, tested, {quantity: np.concatenate(errors) for quantity, errors in parts.items()})
