"""The budget of a simulated fleet over time, and what its energy counters say that it draws."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from pals_ray.control.budget.moving_budget import FollowedSignal
from pals_ray.control.budget.schedule import Schedule, budget_at
from pals_ray.simulation.setting import SimSetting
from pals_ray.types import BudgetSource as SourceStatus


def budget_at_start_w(setting: SimSetting) -> float:
    """The budget when the run begins, W at node level."""
    plan = setting.plan
    if isinstance(plan, Schedule):
        return budget_at(plan, setting.budget_w, 0.0).budget_w
    if isinstance(plan, FollowedSignal):
        return min(plan.following.target_w(plan.signal().at(0.0)), plan.following.ceiling_w)
    return setting.budget_w


class BudgetSource:
    """What the manager's core says of the budget, kept for the next manager and for the result.

    `budget_w` holds now; `target_w` is the draw that a followed signal asks for; `note` is the first warning. W at node
    level.
    """

    def __init__(
        self, setting: SimSetting, drawn_j: Callable[[float], float], moved: Callable[[float, float], None]
    ) -> None:
        """`drawn_j` gives the fleet's energy up to a time, J; `moved` is called with the time and the new budget."""
        self.budget_w = budget_at_start_w(setting)
        self.target_w: float | None = None
        self.note: str | None = None
        self._follows = isinstance(setting.plan, FollowedSignal)
        self._drawn_j = drawn_j
        self._moved = moved
        self._last: tuple[float, float] | None = None

    def drawn_w(self, now_s: float) -> float | None:
        """The fleet's mean draw since the last call, W; None the first time, and where no signal is followed."""
        if not self._follows:
            return None
        drawn_j, last, drawn_w = self._drawn_j(now_s), self._last, None
        if last is not None and now_s > last[0]:
            drawn_w = (drawn_j - last[1]) / (now_s - last[0])
        self._last = (now_s, drawn_j)
        return drawn_w

    def take(self, said: SourceStatus, budget_w: float, now_s: float) -> float:
        """Take what the manager says of its budget; returns when that changes next, s of the run.

        Only the first warning is kept: later ones differ in their watts alone.
        """
        if budget_w != self.budget_w:
            self._moved(now_s, budget_w)
        self.budget_w, self.note = budget_w, self.note or said.warning
        if said.kind == "signal":
            self.target_w = said.asked_w
        return inf if said.next_change_s is None else said.next_change_s
