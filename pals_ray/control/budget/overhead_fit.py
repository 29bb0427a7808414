"""Node overhead `a + b * GPU watts` from measured watts of a node and of its GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pals_ray.control.snapshot import Overhead
from pals_ray.errors import PalsError

LEAST_SAMPLES = 10
#: GPU watts have to vary by so much of their largest value, or `a` and `b` cannot be told apart.
LEAST_SPREAD = 0.1
#: Samples further from the line than this many (robust) standard deviations do not count.
OUTLIER_SIGMAS = 4.0
#: With more outliers than this share, no line describes the node.
MOST_OUTLIERS = 0.2


class OverheadError(PalsError):
    """Measurements that no node overhead can be taken from."""


@dataclass(frozen=True, slots=True)
class NodeSample:
    """Watts of a whole node and of all its GPUs together, at one time; `row` is where an operator finds it."""

    row: int
    node_w: float
    gpu_w: float


@dataclass(frozen=True, slots=True)
class OverheadFit:
    """The overhead, the standard deviation of what it leaves unexplained, W, and the rows that were left out."""

    overhead: Overhead
    residual_w: float
    left_out: tuple[int, ...]


def fit_overhead(samples: Sequence[NodeSample]) -> OverheadFit:
    """Fit node watts less GPU watts to `a_w + b * GPU watts`, robustly.

    A median of slopes between far-apart samples (abbreviated Theil-Sen) finds the line that most samples lie on;
    least squares over those gives the result. Raises `OverheadError`, naming the row or the figure at fault.
    """
    for sample in samples:
        _check(sample)
    if len(samples) < LEAST_SAMPLES:
        raise OverheadError(f"{len(samples)} rows are too few to fit a node's overhead: {LEAST_SAMPLES} at least")
    gpu_w = np.array([sample.gpu_w for sample in samples])
    other_w = np.array([sample.node_w for sample in samples]) - gpu_w
    low_w, high_w = np.quantile(gpu_w, [0.05, 0.95])
    if high_w - low_w < LEAST_SPREAD * high_w:
        raise OverheadError(
            f"GPU watts lie between {low_w:.0f} and {high_w:.0f} W in nearly all rows, too close together to tell a "
            f"from b; measure the node both idle and under load"
        )
    start_residual_w = other_w - np.polyval(_far_pairs_line(gpu_w, other_w, high_w - low_w), gpu_w)
    # A spread of 0 is possible for made-up data: rounding alone must then not make outliers.
    spread_w = max(1.4826 * float(np.median(np.abs(start_residual_w))), 1e-6 * high_w)
    near = np.abs(start_residual_w) <= OUTLIER_SIGMAS * spread_w
    left_out = tuple(sample.row for sample, kept in zip(samples, near, strict=True) if not kept)
    if len(left_out) > MOST_OUTLIERS * len(samples):
        raise OverheadError(
            f"{len(left_out)} of {len(samples)} rows lie off any line a + b * GPU watts, the first in row "
            f"{left_out[0]}; are both columns of the same node and the same time?"
        )
    b, a_w = np.polyfit(gpu_w[near], other_w[near], 1)
    residual_w = float(np.std(other_w[near] - (a_w + b * gpu_w[near])))
    return OverheadFit(_plausible(float(a_w), float(b), float(high_w)), residual_w, left_out)


def _check(sample: NodeSample) -> None:
    if not (math.isfinite(sample.node_w) and math.isfinite(sample.gpu_w)) or sample.gpu_w < 0:
        raise OverheadError(
            f"row {sample.row}: {sample.node_w} W for the node, {sample.gpu_w} W for its GPUs: no watts"
        )
    if sample.node_w < sample.gpu_w:
        raise OverheadError(
            f"row {sample.row}: the node draws {sample.node_w:g} W, less than the {sample.gpu_w:g} W of its GPUs; "
            "node watts include the GPUs'"
        )


def _far_pairs_line(x: NDArray[np.float64], y: NDArray[np.float64], spread: float) -> tuple[float, float]:
    """(slope, intercept): medians, the slope's over pairs half of the sorted samples apart that differ enough in x."""
    order = np.argsort(x, kind="stable")
    half = len(x) // 2
    near, far = order[:half], order[-half:]
    apart = x[far] - x[near] >= 0.1 * spread
    slope = float(np.median((y[far] - y[near])[apart] / (x[far] - x[near])[apart]))
    return slope, float(np.median(y - slope * x))


def _plausible(a_w: float, b: float, high_w: float) -> Overhead:
    """Refuse a line that no node has. A term that is negative by less than 1 % of GPU watts counts as none."""
    if a_w < -0.01 * high_w or not -0.01 <= b <= 1.0:
        raise OverheadError(
            f"the rows fit an overhead of {a_w:.0f} W + {b:.3f} x GPU watts, but a must not be negative and b lies in "
            "[0, 1]; are the GPU watts those of all GPUs of the node together?"
        )
    return Overhead(max(a_w, 0.0), max(b, 0.0))
