"""Measured samples as a table, and the checks with which `pals fit` refuses those that no model can be fitted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pals_ray.errors import PalsError
from pals_ray.models.power_model import FloatArray

#: Columns of a samples file: those that must be there, and those that may.
REQUIRED_COLUMNS = ("power_cap_w", "batch_limit", "throughput_tokens_per_s", "power_w")
LATENCY_COLUMNS = ("itl_p50_s", "itl_p99_s", "ttft_p50_s", "ttft_p99_s")
OPTIONAL_COLUMNS = ("num_gpus", *LATENCY_COLUMNS)

MIN_CELLS = 4
_MIN_BATCHES = 2


class SampleError(PalsError):
    """Measurements that no model can be fitted to: names the row, or what is missing."""


@dataclass(frozen=True, slots=True)
class SampleTable:
    """Measurements as columns of equal length; `power_w` is the whole replica's, `cap_w` one GPU's.

    `latency` maps names of `LATENCY_COLUMNS` to seconds, NaN where a row has none.
    """

    cap_w: FloatArray
    batch: FloatArray
    throughput_tokens_per_s: FloatArray
    power_w: FloatArray
    num_gpus: int = 1
    latency: Mapping[str, FloatArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """A latency that no row has is left out."""
        known = {name: values for name, values in self.latency.items() if np.isfinite(values).any()}
        object.__setattr__(self, "latency", known)

    def __len__(self) -> int:
        return len(self.cap_w)

    def take(self, rows: Sequence[int] | ArrayLike) -> SampleTable:
        """Only these rows, in this order."""
        at = np.asarray(rows, dtype=np.intp)
        return self._each(lambda values: values[at])

    def merged(self) -> SampleTable:
        """One row per distinct (cap, batch), its values averaged, ordered by cap and batch."""
        cells, group = np.unique(np.stack([self.cap_w, self.batch], axis=1), axis=0, return_inverse=True)
        group = group.reshape(-1)

        def mean(values: FloatArray) -> FloatArray:
            known = np.isfinite(values)
            count = np.bincount(group, weights=known, minlength=len(cells))
            total = np.bincount(group, weights=np.where(known, values, 0.0), minlength=len(cells))
            return np.where(count > 0, total / np.maximum(count, 1), np.nan)

        return replace(self._each(mean), cap_w=cells[:, 0], batch=cells[:, 1])

    def _each(self, change: Callable[[FloatArray], FloatArray]) -> SampleTable:
        """Every column changed alike."""
        cap_w, batch, throughput, power_w = map(
            change, (self.cap_w, self.batch, self.throughput_tokens_per_s, self.power_w)
        )
        latency = {name: change(values) for name, values in self.latency.items()}
        return SampleTable(cap_w, batch, throughput, power_w, self.num_gpus, latency)


def samples_from_columns(
    columns: Mapping[str, Sequence[object]], row_numbers: Sequence[int] | None = None
) -> SampleTable:
    """Check raw columns (numbers or text) and make a table of them.

    `row_numbers` is what messages call the rows (a file's lines; from 1 where not given). Raises `SampleError` naming
    the column and row that is wrong. Optional columns may be absent or have empty cells.
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise SampleError(
            f"column {', '.join(missing)} missing: needed are {', '.join(REQUIRED_COLUMNS)}, "
            f"optional {', '.join(OPTIONAL_COLUMNS)}; found {', '.join(columns) or 'none'}"
        )
    rows = row_numbers if row_numbers is not None else range(1, 1 + max(map(len, columns.values())))
    cap_w, batch, throughput, power_w = (
        _numbers(name, columns[name], rows, optional=False) for name in REQUIRED_COLUMNS
    )
    if len({len(cap_w), len(batch), len(throughput), len(power_w)}) > 1:
        raise SampleError("columns differ in length: every row needs every required column")

    def refuse(name: str, values: FloatArray, wrong: NDArray[np.bool_], why: str) -> None:
        for row in np.flatnonzero(wrong):
            raise SampleError(f"row {rows[row]}: {name} is {values[row]:g}, {why}")

    refuse("batch_limit", batch, (batch < 1) | (batch != np.floor(batch)), "must be a whole number of at least 1")
    latency = {name: _numbers(name, columns[name], rows, optional=True) for name in LATENCY_COLUMNS if name in columns}
    counts = _numbers("num_gpus", columns.get("num_gpus", ()), rows, optional=True)
    known = np.isfinite(counts)
    if not known.any():
        return SampleTable(cap_w, batch, throughput, power_w, 1, latency)
    refuse("num_gpus", counts, known & (counts != np.floor(counts)), "must be a whole number")
    sizes, times = np.unique(counts[known], return_counts=True)
    most = sizes[times.argmax()]
    others = f"most others have {most:g}: one file holds one replica size; split it"
    refuse("num_gpus", counts, known & (counts != most), others)
    return SampleTable(cap_w, batch, throughput, power_w, int(most), latency)


def check_enough(table: SampleTable) -> None:
    """Refuse a table with too few points or a single batch limit. Raises `SampleError` saying what to measure."""
    cells = set(zip(table.cap_w, table.batch, strict=True))
    if len(cells) < MIN_CELLS:
        raise SampleError(
            f"{len(cells)} distinct (cap, batch) point(s) are too few: at least {MIN_CELLS}, better 12, are needed"
        )
    batches = np.unique(table.batch)
    if len(batches) < _MIN_BATCHES:
        raise SampleError(
            f"all rows have batch_limit {batches[0]:g}: the effect of the batch cannot be fitted; measure at least "
            f"{_MIN_BATCHES} batch limits"
        )


def _numbers(name: str, values: Sequence[object], rows: Sequence[int], optional: bool) -> FloatArray:
    out = np.full(len(values), np.nan)
    for i, raw in enumerate(values):
        if optional and (raw is None or str(raw).strip() == ""):
            continue
        try:
            number = float(str(raw))
        except ValueError:
            raise SampleError(f"row {rows[i]}: {name} is {raw!r}, must be a number") from None
        if optional and np.isnan(number):
            continue
        if not np.isfinite(number) or number <= 0.0:
            raise SampleError(f"row {rows[i]}: {name} is {number:g}, must be finite and above 0")
        out[i] = number
    return out
