"""What a virtual GPU draws and has drawn: its last step, its draw between steps, and recent values of its energy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals_ray.gpus.virtual_block import TRAIL_LENGTH, Latch

_ANCHOR_GAP_S = 0.010


class Load(NamedTuple):
    """The last step: from `start_s` to `end_s` at `power_w`, and `rest_w` outside it.

    `energy_j` is the counter at `start_s`. `binding` is 1 where the cap held the step's clock down. `anchors` counts
    the entries ever made in the trail.
    """

    energy_j: float
    start_s: float
    end_s: float
    power_w: float
    rest_w: float
    binding: float
    anchors: float

    def power_at(self, now_s: float) -> float:
        """Draw at an instant, W."""
        return self.power_w if self.start_s <= now_s < self.end_s else self.rest_w

    def energy_at(self, now_s: float) -> float:
        """The counter at an instant not before `start_s`, J: continuous, and growing while it draws anything."""
        in_step_s = min(max(now_s, self.start_s), self.end_s) - self.start_s
        resting_s = now_s - self.start_s - in_step_s
        return self.energy_j + self.power_w * in_step_s + self.rest_w * resting_s

    def then(self, start_s: float, end_s: float, power_w: float, rest_w: float, binding: bool, now_s: float) -> Load:
        """The load once another step is recorded at `now_s`. The energy counter never falls below what it showed."""
        start_s = max(start_s, self.start_s)
        end_s = max(end_s, start_s)
        new = Load(self.energy_at(start_s), start_s, end_s, power_w, rest_w, float(binding), self.anchors)
        taken_back_j = max(0.0, self.energy_at(now_s) - new.energy_at(now_s))
        return new._replace(energy_j=new.energy_j + taken_back_j)


class LoadRecord:
    """The load of one GPU in the shared block. The one writer is the process that holds the GPU, or holds the lock."""

    def __init__(self, latch: Latch, trail: NDArray[np.float64]) -> None:
        """`trail`: (TRAIL_LENGTH, 2) of time, s, and counter, J: a ring of anchors."""
        self._latch = latch
        self._trail = trail
        self._last_anchor_s = -np.inf

    def read(self) -> Load:
        """The load now."""
        return Load(*self._latch.read())

    def record(
        self, start_s: float, end_s: float, power_w: float, now_s: float, *, rest_w: float, binding: bool = False
    ) -> None:
        """Add a step, which may end in the future. An empty one (start = end) only changes the draw between steps."""
        load = self.read().then(start_s, end_s, power_w, rest_w, binding, now_s)
        anchors = int(load.anchors)
        if load.start_s - self._last_anchor_s >= _ANCHOR_GAP_S:
            self._trail[anchors % TRAIL_LENGTH] = (load.start_s, load.energy_j)
            self._last_anchor_s = load.start_s
            anchors += 1
        self._latch.write(load._replace(anchors=float(anchors)))

    def mean_power_w(self, now_s: float, window_s: float) -> float:
        """Mean draw over the last `window_s` (at most 1 s), or since the counter began if that is less, W."""
        while True:
            version = self._latch.version()
            load, trail = self.read(), self._trail.copy()
            if self._latch.version() == version:
                break
        # A writer may be filling the next anchor at this moment, so it is left out.
        writing = int(load.anchors) % TRAIL_LENGTH
        anchors = np.delete(trail, writing, axis=0)
        anchors = anchors[np.argsort(anchors[:, 0])]
        since_s = max(now_s - window_s, float(anchors[0, 0]))
        if since_s >= now_s:
            return load.power_at(now_s)
        if since_s >= load.start_s:
            since_j = load.energy_at(since_s)
        else:
            times, joules = np.append(anchors, [[load.start_s, load.energy_j]], axis=0).T
            since_j = float(np.interp(since_s, times, joules))
        return (load.energy_at(now_s) - since_j) / (now_s - since_s)
