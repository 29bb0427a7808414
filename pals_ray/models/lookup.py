"""A replica's model as a table of tokens/s, W, ITL and TTFT over (cap, batch limit), answered within microseconds.

Interpolated bilinearly in logs. It imports numpy only, because every agent holds one and agents must stay small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pals_ray.models.power_model import FloatArray, PowerModel, Prediction

# A mean draw above the cap by more than this factor is not noise: the clock floor keeps it there.
_FLOOR_TOLERANCE = 1.02
_CAP_KNOTS = 64
_BATCH_KNOTS_PER_OCTAVE = 4


@dataclass(frozen=True, slots=True)
class FitReport:
    """How a fit went: parameters found, what stayed at the prior, and rows that lost weight."""

    values: dict[str, float]
    undetermined: tuple[str, ...]
    outliers: tuple[tuple[float, int], ...]

    def notes(self) -> tuple[str, ...]:
        """Sentences for an operator; none if all is well."""
        unknown = f"not determined by these samples (prior kept): {'; '.join(self.undetermined)}"
        bad = (
            f"sample at {cap:g} W, batch {batch} contradicts the others: weighed down" for cap, batch in self.outliers
        )
        return (*([unknown] if self.undetermined else []), *bad)


class SurfaceModel:
    """A `PowerModel` looked up in a table of logs.

    `fields` has shape (caps, log2 batches, 8): logs of throughput, replica power, the four latencies, then the two
    relative standard deviations.
    """

    def __init__(
        self, caps_w: FloatArray, log2_batches: FloatArray, fields: FloatArray, num_gpus: int, report: FitReport
    ) -> None:
        self._log_caps = np.log(caps_w)
        self._log2_batches = log2_batches
        self._fields = np.ascontiguousarray(fields)
        self.num_gpus = num_gpus
        self.report = report

    def predict(self, cap_w: ArrayLike, batch: ArrayLike) -> Prediction:
        """Broadcast `cap_w` (W per GPU) against `batch`; points outside the table get the value at its edge."""
        cap, batch = np.broadcast_arrays(np.asarray(cap_w, dtype=np.float64), np.asarray(batch, dtype=np.float64))
        shape = cap.shape
        cap = cap.reshape(-1)
        row, up = _place(self._log_caps, np.log(np.maximum(cap, 1e-3)))
        column, along = _place(self._log2_batches, np.log2(np.maximum(batch.reshape(-1), 1.0)))
        width = len(self._log2_batches)
        flat = self._fields.reshape(-1, self._fields.shape[-1])
        corner = row * width + column
        up, along = up[:, None], along[:, None]
        low = flat[corner] * (1.0 - along) + flat[corner + 1] * along
        high = flat[corner + width] * (1.0 - along) + flat[corner + width + 1] * along
        found = low * (1.0 - up) + high * up
        values = np.exp(found[:, :6])
        honours = values[:, 1] <= cap * self.num_gpus * _FLOOR_TOLERANCE
        columns = (column.reshape(shape) for column in (*values.T, *found[:, 6:].T))
        return Prediction(*columns, honours_cap=honours.reshape(shape))


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A replica's model, with a sentence for operators on where it comes from."""

    source: str
    surface: PowerModel


def _place(knots: FloatArray, at: FloatArray) -> tuple[np.ndarray[tuple[int], np.dtype[np.intp]], FloatArray]:
    """Left knot and share of the way to the next, clamped to the table (as `np.clip`, in half its time)."""
    left = np.minimum(np.maximum(np.searchsorted(knots, at, side="right") - 1, 0), len(knots) - 2)
    share = (at - knots[left]) / (knots[left + 1] - knots[left])
    return left, np.minimum(np.maximum(share, 0.0), 1.0)


def tabulated(
    model: PowerModel, min_limit_w: float, max_limit_w: float, most_batch: int, num_gpus: int
) -> SurfaceModel:
    """A slow model as a table over a device's caps, W, and batches from 1 to `most_batch`."""
    caps_w, log2 = knots(min_limit_w, max_limit_w, np.log2(most_batch))
    values = np.stack(model.predict(caps_w[:, None], np.exp2(log2)[None, :]).floats(), axis=-1)
    values[..., :6] = np.log(values[..., :6])
    return SurfaceModel(caps_w, log2, values, num_gpus, FitReport({}, (), ()))


def knots(low_w: float, high_w: float, top_log2: float) -> tuple[FloatArray, FloatArray]:
    """The caps, W, and log2 batches of a table over a range of caps and batches from 1 to 2 ** `top_log2`."""
    batches = np.linspace(0.0, top_log2, int(np.ceil(top_log2 * _BATCH_KNOTS_PER_OCTAVE)) + 1)
    return np.geomspace(low_w, high_w, _CAP_KNOTS), batches
