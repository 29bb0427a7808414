"""Which point to measure next: the one that reduces the uncertainty of all points most.

The rule knows all cells of the grid, but values only of those already measured. It begins with the corners of the
grid and the middle batch, then takes the cell whose measurement would reduce the summed variance of log throughput
and log power over all cells most (Cohn's active learning), given the fit to what is known so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pals_ray.models.fitting.fit import POWER_NOISE, THROUGHPUT_NOISE, Posterior
from pals_ray.models.fitting.sample_checks import SampleTable
from pals_ray.models.power_model import FloatArray
from pals_ray.models.specs import ModelSpec

# Weight of power's variance beside throughput's, which is noisier by about this factor in every file at hand.
_POWER_OVER_THROUGHPUT_WEIGHT = 3.4


def first_points(cap_w: FloatArray, batch: FloatArray) -> tuple[int, ...]:
    """The four cells to begin with (indices): highest cap at largest, smallest, middle batch; lowest cap at largest."""
    log2 = np.log2(batch)
    middle = (log2.min() + log2.max()) / 2.0
    wanted = (
        (cap_w.max(), log2.max()),
        (cap_w.max(), log2.min()),
        (cap_w.min(), log2.max()),
        (cap_w.max(), middle),
    )
    cap_range, batch_range = max(float(np.ptp(cap_w)), 1e-9), max(float(np.ptp(log2)), 1e-9)
    chosen: list[int] = []
    for cap, log2_batch in wanted:
        distance = ((cap_w - cap) / cap_range) ** 2 + ((log2 - log2_batch) / batch_range) ** 2
        distance[chosen] = np.inf
        chosen.append(int(np.argmin(distance)))
    return tuple(chosen)


def next_point(
    cap_w: FloatArray, batch: FloatArray, taken: Sequence[int], measured: SampleTable, model: ModelSpec | None = None
) -> int | None:
    """Index of the cell to measure next; None when all are taken. `measured` has one row per index of `taken`."""
    free = [i for i in range(len(cap_w)) if i not in set(taken)]
    if not free:
        return None
    for i in first_points(cap_w, batch):
        if i not in taken:
            return i
    covariance = Posterior(measured, model).covariance(cap_w, batch)
    m = len(cap_w)
    weight = np.concatenate([np.ones(m), np.full(m, _POWER_OVER_THROUGHPUT_WEIGHT)])
    noise = np.diag([THROUGHPUT_NOISE**2, POWER_NOISE**2])

    def gain(i: int) -> float:
        """By how much measuring cell `i` would reduce the weighted variance."""
        pair = [i, m + i]
        across = covariance[:, pair]
        inverse = np.linalg.inv(covariance[np.ix_(pair, pair)] + noise)
        return float(weight @ np.einsum("ij,jk,ik->i", across, inverse, across))

    return max(free, key=gain)


def choose_points(
    cap_w: FloatArray,
    batch: FloatArray,
    count: int,
    measure: Callable[[list[int]], SampleTable],
    model: ModelSpec | None = None,
) -> list[int]:
    """Choose `count` cells one after another; `measure(indices)` gives the rows of those taken so far."""
    taken: list[int] = []
    while len(taken) < count:
        chosen = next_point(cap_w, batch, taken, measure(taken), model)
        if chosen is None:
            break
        taken.append(chosen)
    return taken
