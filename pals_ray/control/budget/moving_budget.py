"""What moves the budget by itself: a schedule, or a signal that is followed. Watts are at node level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pals_ray.control.budget.regulation import Signal
from pals_ray.control.budget.schedule import Schedule, at_least, budget_at
from pals_ray.control.budget.signal_following import FleetWatts, Following, FollowState, step
from pals_ray.types import BudgetSource


@dataclass(frozen=True, slots=True)
class FollowedSignal:
    """A signal as it is written down: values in [-1, 1] at times, s, that count from `started_s`, Unix s."""

    following: Following
    time_s: tuple[float, ...]
    value: tuple[float, ...]
    started_s: float

    def signal(self) -> Signal:
        """The signal itself. Raises `RegulationError` for one that cannot be followed."""
        return Signal(np.array(self.time_s, dtype=np.float64), np.array(self.value, dtype=np.float64))


BudgetPlan = FollowedSignal | Schedule


class BudgetMover:
    """Says what the budget is to be now.

    A schedule is written in wall-clock time and follows that clock where it jumps. A signal goes on by the monotonic
    clock.
    """

    def __init__(self, plan: BudgetPlan, set_w: float, wall_s: float, now_s: float) -> None:
        """`set_w` is the budget that was set before, W: a schedule's while no entry holds. Raises `RegulationError`."""
        self._plan = plan
        self._set_w = set_w
        self._wall_less_now_s = wall_s - now_s
        self._state = FollowState()
        self._signal = plan.signal() if isinstance(plan, FollowedSignal) else None
        self._next_change_s = math.inf

    @property
    def name(self) -> str:
        """What moves the budget, for a message."""
        return "the schedule" if isinstance(self._plan, Schedule) else "the followed signal"

    def wait_s(self, wall_s: float, at_most_s: float) -> float:
        """How long until the budget has to be looked at again, s: the schedule's next change, at most `at_most_s`."""
        return max(min(self._next_change_s - wall_s, at_most_s), 0.0)

    def ask(self, watts: FleetWatts, wall_s: float, now_s: float) -> tuple[float, BudgetSource]:
        """The budget from now on, W, and what to tell an operator: never under what the fleet needs, with a warning."""
        if isinstance(self._plan, Schedule):
            return self._scheduled(self._plan, watts, wall_s)
        return self._followed(self._plan, watts, now_s)

    def _scheduled(self, schedule: Schedule, watts: FleetWatts, wall_s: float) -> tuple[float, BudgetSource]:
        asked = budget_at(schedule, self._set_w, wall_s)
        budget_w, warning = at_least(asked.budget_w, watts.needed_w, self.name)
        # On a ramp it changes all the time, and once every beat is often enough.
        self._next_change_s = asked.next_change_s if asked.next_change_s > wall_s else math.inf
        next_s = self._next_change_s if self._next_change_s < math.inf else None
        return budget_w, BudgetSource("schedule", self._set_w, asked.budget_w, asked.reason, warning, next_s)

    def _followed(self, plan: FollowedSignal, watts: FleetWatts, now_s: float) -> tuple[float, BudgetSource]:
        assert self._signal is not None
        elapsed_s = now_s + self._wall_less_now_s - plan.started_s
        y = self._signal.mean(elapsed_s, plan.following.smooth_s)
        self._state = done = step(self._state, plan.following, y, now_s, watts)
        left_s = self._signal.end_s - elapsed_s
        until = f"{left_s:.0f} s of it left" if left_s > 0 else "it has ended: the base holds"
        return done.budget_w, BudgetSource(
            "signal", self._set_w, done.target_w, f"{done.reason}; {until}", done.warning, None
        )
