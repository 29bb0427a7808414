"""Measured samples as a table, and the checks with which `pals fit` refuses those that no model can be fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

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

    def __len__(self) -> int:
        return len(self.cap_w)

    def take(self, rows: Sequence[int] | ArrayLike) -> SampleTable:
        """Only these rows, in this order; a latency that none of them has is left out."""
        at = np.asarray(rows, dtype=np.intp)
        return SampleTable(
            self.cap_w[at],
            self.batch[at],
            self.throughput_tokens_per_s[at],
            self.power_w[at],
            self.num_gpus,
            {name: values[at] for name, values in self.latency.items() if np.isfinite(values[at]).any()},
        )

    def merged(self) -> SampleTable:
        """One row per distinct (cap, batch), its values averaged, ordered by cap and batch."""
        cells, group = np.unique(np.stack([self.cap_w, self.batch], axis=1), axis=0, return_inverse=True)
        group = group.reshape(-1)

        def mean(values: FloatArray) -> FloatArray:
            known = np.isfinite(values)
            count = np.bincount(group, weights=known, minlength=len(cells))
            total = np.bincount(group, weights=np.where(known, values, 0.0), minlength=len(cells))
            return np.where(count > 0, total / np.maximum(count, 1), np.nan)

        return SampleTable(
            cells[:, 0],
            cells[:, 1],
            mean(self.throughput_tokens_per_s),
            mean(self.power_w),
            self.num_gpus,
            {name: mean(values) for name, values in self.latency.items()},
        )


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
    required = {name: _numbers(name, columns[name], rows, optional=False) for name in REQUIRED_COLUMNS}
    if len({len(values) for values in required.values()}) > 1:
        raise SampleError("columns differ in length: every row needs every required column")
    batch = required["batch_limit"]
    for i, value in enumerate(batch):
        if value < 1 or value != int(value):
            raise SampleError(f"row {rows[i]}: batch_limit is {value:g}, must be a whole number of at least 1")
    latency = {name: _numbers(name, columns[name], rows, optional=True) for name in LATENCY_COLUMNS if name in columns}
    num_gpus = 1
    if "num_gpus" in columns:
        counts = _numbers("num_gpus", columns["num_gpus"], rows, optional=True)
        known, times = np.unique(counts[np.isfinite(counts)], return_counts=True)
        if len(known):
            most = known[times.argmax()]
            for row in np.flatnonzero(np.isfinite(counts) & (counts != np.floor(counts))):
                raise SampleError(f"row {rows[row]}: num_gpus is {counts[row]:g}, must be a whole number")
            for row in np.flatnonzero(np.isfinite(counts) & (counts != most)):
                raise SampleError(
                    f"row {rows[row]}: num_gpus is {counts[row]:g}, most others have {most:g}: one file holds one "
                    "replica size; split it"
                )
            num_gpus = int(most)
    return SampleTable(
        required["power_cap_w"],
        batch,
        required["throughput_tokens_per_s"],
        required["power_w"],
        num_gpus,
        {name: values for name, values in latency.items() if np.isfinite(values).any()},
    )


def check_enough(table: SampleTable) -> None:
    """Refuse a table with too few points or a single batch limit. Raises `SampleError` saying what to measure."""
    cells = {(c, b) for c, b in zip(table.cap_w, table.batch, strict=True)}
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
