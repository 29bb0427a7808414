"""What moves a simulated fleet's budget, and what its counters say that it draws."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from pals_ray.control.budget import moving_budget
from pals_ray.control.budget.schedule import budget_at
from pals_ray.simulation.setting import Budget, ConstantBudget, ScheduledBudget
from pals_ray.types import BudgetSource as SourceStatus


class BudgetSource:
    """The setting's budget as the manager's core takes it. `budget_w` holds now, and before the first look.

    `set_w` is the budget that was set, `plan` what moves it (None: nothing), both W at node level; the run starts at
    Unix time `start_s`. `target_w` is the draw that a followed signal asks for. `drawn_j` says how much the fleet has
    drawn up to a time, J; `moved` hears of each other budget, at its time.
    """

    def __init__(self, budget: Budget, drawn_j: Callable[[float], float]) -> None:
        self.plan: moving_budget.BudgetPlan | None = None
        self.start_s = 0.0
        self.target_w: float | None = None
        self.note: str | None = None
        self.moved: Callable[[float, float], None] = lambda _now_s, _budget_w: None
        self._drawn_j = drawn_j
        self._last: tuple[float, float] | None = None
        if isinstance(budget, ConstantBudget):
            self.budget_w = self.set_w = budget.budget_w
        elif isinstance(budget, ScheduledBudget):
            self.plan = moving_budget.ScheduledBudget(budget.schedule.entries)
            self.set_w, self.start_s = budget.base_w, budget.start_s
            self.budget_w = budget_at(budget.schedule, budget.base_w, budget.start_s).budget_w
        else:
            signal, following = budget.signal, budget.following
            times, values = tuple(signal.time_s.tolist()), tuple(signal.value.tolist())
            self.plan = moving_budget.FollowedSignal(following, times, values, 0.0)
            self.budget_w = self.set_w = min(following.target_w(signal.at(0.0)), following.ceiling_w)

    def drawn_w(self, now_s: float) -> float | None:
        """The fleet's mean draw since this was asked last, W; None the first time, and where no signal is followed."""
        if not isinstance(self.plan, moving_budget.FollowedSignal):
            return None
        drawn_j, last, drawn_w = self._drawn_j(now_s), self._last, None
        if last is not None and now_s > last[0]:
            drawn_w = (drawn_j - last[1]) / (now_s - last[0])
        self._last = (now_s, drawn_j)
        return drawn_w

    def look(self, said: SourceStatus, budget_w: float, now_s: float) -> float:
        """Note what the manager says of its budget; returns when that changes next, s of the run.

        Only the first warning is kept: those that follow differ in their watts alone.
        """
        if budget_w != self.budget_w:
            self.moved(now_s, budget_w)
        self.budget_w, self.note = budget_w, self.note or said.warning
        if said.kind == "signal":
            self.target_w = said.asked_w
        return inf if said.next_change_s is None else said.next_change_s - self.start_s
