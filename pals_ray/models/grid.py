"""A model precomputed on a grid of caps and whole batches, for simulations, which ask it many thousand times."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pals_ray.models.power_model import FloatArray, PowerModel, Prediction

_CAPS = 121


class GridModel:
    """A `PowerModel` with another's answers: exact at whole batches up to `max_batch`, linear between 121 caps.

    The caps span the device's range. A batch between two whole ones is rounded up.
    """

    def __init__(self, model: PowerModel, min_limit_w: float, max_limit_w: float, max_batch: int) -> None:
        caps_w = np.linspace(min_limit_w, max_limit_w, _CAPS)
        said = model.predict(caps_w[:, None], np.arange(1.0, max_batch + 1.0)[None, :])
        # (caps, fields, batches), so that all values at one cap are contiguous in memory.
        self._table = np.stack(said.floats(), axis=1)
        self._honours = said.honours_cap
        self._min_limit_w = min_limit_w
        self._per_w = (_CAPS - 1) / (max_limit_w - min_limit_w)
        self._max_batch = max_batch
        self._columns: dict[bytes, tuple[FloatArray, NDArray[np.bool_]]] = {}

    def predict(self, cap_w: ArrayLike, batch: ArrayLike) -> Prediction:
        """Broadcast `cap_w` (W per GPU) against `batch`; points outside the grid get the value at its edge."""
        caps, batches = np.asarray(cap_w, dtype=np.float64), np.asarray(batch, dtype=np.float64)
        if caps.ndim == 2 and caps.shape[1] == 1 and batches.ndim == 2 and batches.shape[0] == 1:
            return self._crossed(caps[:, 0], batches[0])
        caps, batches = np.broadcast_arrays(caps, batches)
        row, share = self._rows(caps)
        column = self._column(batches)
        low, high = self._table[row, :, column], self._table[row + 1, :, column]
        found = low + share[..., None] * (high - low)
        return Prediction(*np.moveaxis(found, -1, 0), honours_cap=self._honours[row, column])

    def _crossed(self, caps_w: FloatArray, batches: FloatArray) -> Prediction:
        """Every cap with every batch."""
        key = batches.tobytes()
        if key not in self._columns:
            column = self._column(batches)
            self._columns[key] = (np.ascontiguousarray(self._table[:, :, column]), self._honours[:, column])
        table, honours = self._columns[key]
        row, share = self._rows(caps_w)
        low = table[row]
        found = table[row + 1]
        found -= low
        found *= share[:, None, None]
        found += low
        return Prediction(*found.swapaxes(0, 1), honours_cap=honours[row])

    def _rows(self, caps_w: FloatArray) -> tuple[NDArray[np.intp], FloatArray]:
        at = np.minimum(np.maximum((caps_w - self._min_limit_w) * self._per_w, 0.0), _CAPS - 1 - 1e-9)
        row = at.astype(np.intp)
        return row, at - row

    def _column(self, batches: FloatArray) -> NDArray[np.intp]:
        whole = np.ceil(batches - 1e-9).astype(np.intp)
        column: NDArray[np.intp] = np.minimum(np.maximum(whole, 1), self._max_batch) - 1
        return column
