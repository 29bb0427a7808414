"""The budget over time: constant, scheduled or following a signal, and never under what the lowest caps need."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from pals_ray.control.budget.schedule import at_least, budget_at
from pals_ray.control.budget.signal_following import FollowState, step
from pals_ray.simulation.setting import Budget, ConstantBudget, ScheduledBudget


class BudgetSource:
    """What the budget is now, W at node level. `drawn_j` says how much the fleet has drawn up to a time, J."""

    def __init__(self, budget: Budget, drawn_j: Callable[[float], float]) -> None:
        self.target_w: float | None = None
        self.note: str | None = None
        self._budget = budget
        self._drawn_j = drawn_j
        self._following = FollowState()
        self._last: tuple[float, float] | None = None
        self.budget_w = self._first_w()

    def _first_w(self) -> float:
        if isinstance(self._budget, ConstantBudget):
            return self._budget.budget_w
        if isinstance(self._budget, ScheduledBudget):
            return budget_at(self._budget.schedule, self._budget.base_w, self._budget.start_s).budget_w
        following = self._budget.following
        return min(following.target_w(self._budget.signal.at(0.0)), following.ceiling_w)

    def at(self, now_s: float, *, needed_w: float, occupied_w: float) -> tuple[float, float]:
        """The budget now, W, and when it changes next; not after the next look in any case.

        `needed_w` is the least that can be kept, `occupied_w` the charge in force plus the reserve.
        """
        budget = self._budget
        if isinstance(budget, ConstantBudget):
            self.budget_w, next_s = budget.budget_w, inf
        elif isinstance(budget, ScheduledBudget):
            asked = budget_at(budget.schedule, budget.base_w, budget.start_s + now_s)
            self.budget_w, warning = at_least(asked.budget_w, needed_w, "the schedule")
            self._note(warning)
            next_s = asked.next_change_s - budget.start_s
        else:
            drawn_j = self._drawn_j(now_s)
            measured_w = None
            if self._last is not None and now_s > self._last[0]:
                measured_w = (drawn_j - self._last[1]) / (now_s - self._last[0])
            self._last = (now_s, drawn_j)
            y = budget.signal.mean(now_s, budget.following.smooth_s)
            self._following, found = step(
                self._following,
                budget.following,
                y,
                now_s,
                measured_w=measured_w,
                occupied_w=occupied_w,
                needed_w=needed_w,
            )
            self.budget_w, self.target_w, next_s = found.budget_w, found.target_w, inf
            self._note(found.warning)
        return self.budget_w, next_s

    def _note(self, warning: str | None) -> None:
        """Keep the first warning: those that follow differ in their watts alone."""
        self.note = self.note or warning
