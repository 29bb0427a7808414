"""What a virtual GPU draws and has drawn: its last step, and its draw between steps."""

from __future__ import annotations

from typing import NamedTuple


class Load(NamedTuple):
    """The last step: from `start_s` to `end_s` at `power_w`, and `rest_w` outside it.

    `energy_j` is the counter at `start_s`. `binding` is 1 where the cap held the step's clock down. In the shared block
    its one writer is the process that holds the GPU, or the lock.
    """

    energy_j: float
    start_s: float
    end_s: float
    power_w: float
    rest_w: float
    binding: float

    def power_at(self, now_s: float) -> float:
        """Draw at an instant, W."""
        return self.power_w if self.start_s <= now_s < self.end_s else self.rest_w

    def energy_at(self, now_s: float) -> float:
        """The counter at an instant not before `start_s`, J: continuous, and growing while it draws anything."""
        in_step_s = min(max(now_s, self.start_s), self.end_s) - self.start_s
        resting_s = now_s - self.start_s - in_step_s
        return self.energy_j + self.power_w * in_step_s + self.rest_w * resting_s

    def then(self, start_s: float, end_s: float, power_w: float, rest_w: float, binding: bool, now_s: float) -> Load:
        """The load once another step is recorded at `now_s`. The step may end in the future; an empty one (start = end)
        only changes the draw between steps. The energy counter never falls below what it showed.
        """
        start_s = max(start_s, self.start_s)
        end_s = max(end_s, start_s)
        new = Load(self.energy_at(start_s), start_s, end_s, power_w, rest_w, float(binding))
        taken_back_j = max(0.0, self.energy_at(now_s) - new.energy_at(now_s))
        return new._replace(energy_j=new.energy_j + taken_back_j)
