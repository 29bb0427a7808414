"""The manager's budget while a schedule or a followed signal moves it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from pals_ray.control.budget.moving_budget import BudgetMover, BudgetPlan
from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.messages import Commands
from pals_ray.errors import InfeasibleBudget
from pals_ray.runtime.manager.view import Device, fleet_watts
from pals_ray.types import BudgetSource

log = logging.getLogger("pals.manager")


class MovingBudget:
    """Nothing moves the budget until `follow`, and again after `end`."""

    def __init__(self) -> None:
        self._mover: BudgetMover | None = None
        self._said: BudgetSource | None = None

    @property
    def moves(self) -> bool:
        """Whether a schedule or signal moves the budget."""
        return self._mover is not None

    def follow(self, plan: BudgetPlan | None, set_w: float) -> None:
        """Go by a plan from now on (None: by none), with the budget that was set, W. Raises `RegulationError`."""
        self._mover = None if plan is None else BudgetMover(plan, set_w, time.time(), time.monotonic())
        self._said = None

    def end(self) -> str | None:
        """Move no more; returns what did, for a message."""
        ended = None if self._mover is None else self._mover.name
        self._mover = self._said = None
        return ended

    def wait_s(self, at_most_s: float) -> float:
        """How long the budget needs no look, s."""
        return at_most_s if self._mover is None else self._mover.wait_s(time.time(), at_most_s)

    def move(self, ledger: Ledger, devices: Mapping[str, Device]) -> Commands | None:
        """Bring the budget to what is asked for now, as far as the fleet can be held to it; None where it stays."""
        if self._mover is None:
            return None
        now_s, before_w = time.monotonic(), ledger.budget_w
        warned = self._said.warning if self._said else None
        budget_w, self._said = self._mover.ask(fleet_watts(ledger, devices, now_s), time.time(), now_s)
        commands = None
        if budget_w != before_w:
            try:
                commands = ledger.set_budget(budget_w, now_s)
            except InfeasibleBudget as error:  # a domain over its own budget: what has been kept so far goes on
                self._said = replace(self._said, warning=f"the budget stays at {before_w:g} W: {error}")
        if self._said.warning is not None and warned is None:
            log.warning("%s", self._said.warning)
        return commands

    def source(self, set_w: float) -> BudgetSource:
        """What moves the budget, or that nothing does, for status."""
        return self._said or BudgetSource("set", set_w, set_w, "as it was set")
