"""The fleet's draw over time, in narrow bins."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

#: Width of a bin, s: a cap cut settles in less.
METER_S = 0.1


class Meter:
    """The energy that all engines draw, at node level, in bins of `METER_S`, J; what comes after them is dropped."""

    def __init__(self, duration_s: float) -> None:
        self._joules = [0.0] * (math.ceil(duration_s / METER_S) + 1)
        self._last = len(self._joules) - 1

    def add(self, from_s: float, to_s: float, power_w: float) -> None:
        """Add a constant draw, W, between two times."""
        first, last = min(int(from_s / METER_S), self._last), min(int(to_s / METER_S), self._last)
        if first == last:
            self._joules[first] += power_w * (to_s - from_s)
            return
        self._joules[first] += power_w * ((first + 1) * METER_S - from_s)
        for i in range(first + 1, last):
            self._joules[i] += power_w * METER_S
        self._joules[last] += power_w * (to_s - last * METER_S)

    def power_w(self, duration_s: float) -> NDArray[np.float64]:
        """Mean draw in each whole bin up to `duration_s`, W."""
        return np.array(self._joules[: int(duration_s / METER_S + 1e-9)]) / METER_S
