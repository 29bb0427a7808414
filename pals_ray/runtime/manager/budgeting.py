"""What sets and moves the manager's budget: an operator, a schedule, a signal; and waiting until it is in force."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import replace

from pals_ray.control.budget.moving_budget import BudgetPlan, FollowedSignal
from pals_ray.errors import PalsError
from pals_ray.runtime.manager.budget_moves import MovingBudget
from pals_ray.runtime.manager.core import FleetCore
from pals_ray.runtime.manager.storage import StorageError
from pals_ray.types import BudgetChange, BudgetSource

SETTLE_DEADLINE_S = 15.0
RAISE_WAIT_S = 2.0

log = logging.getLogger("pals.manager")


class BudgetError(PalsError):
    """A budget that is no number of watts, or that could not be brought into force."""


class BudgetDesk:
    """Moves the budget of one core; `last_settle_s` is how long the last cut took until every cap was in force."""

    def __init__(self, core: FleetCore) -> None:
        self._core = core
        self._moving = MovingBudget()
        self._settling: asyncio.Task[None] | None = None
        self.lock = asyncio.Lock()
        self.last_settle_s: float | None = None

    def restore(self) -> None:
        """Go on with the plan that is on disk; without one nothing moves the budget."""
        self._moving.follow(self._core.state.plan, self._core.state.budget_w)
        self.move()

    @property
    def moves(self) -> bool:
        """Whether a schedule or signal moves the budget."""
        return self._moving.moves

    @property
    def source(self) -> BudgetSource:
        """What moves the budget, or that nothing does."""
        return self._moving.source(self._core.state.budget_w)

    def wait_s(self, at_most_s: float) -> float:
        """How long until the budget may have to move, s: while the fleet stops nothing moves it."""
        return at_most_s if self._core.stopping else self._moving.wait_s(at_most_s)

    async def set(self, budget_w: float) -> BudgetChange:
        """Set the fleet's budget, W, ending what moved it; returns when every cap is in force."""
        called_s = time.monotonic()
        if isinstance(budget_w, bool) or not isinstance(budget_w, int | float) or not math.isfinite(budget_w):
            raise BudgetError(f"a budget of {budget_w!r} is not a number of watts; ask for one, as in set_budget(2400)")
        async with self.lock:
            core, ledger = self._core, self._core.ledger  # a redeploy may have opened another while this waited
            before_w = ledger.budget_w
            commands = core.send_cuts(ledger.set_budget(float(budget_w), time.monotonic()))
            ended = self._moving.end()  # at once: a plan would move the budget again while the disk is slow
            try:
                await core.store(budget_w=float(budget_w), plan=None)
            except StorageError:
                core.send(ledger.set_budget(before_w, time.monotonic()))
                self.restore()
                raise
            core.send(commands)
            core.divide()
            settled_s = await self._settled(called_s)
            if budget_w < before_w:
                self.last_settle_s = settled_s
            await self._raised()
        return BudgetChange(float(budget_w), before_w, settled_s, ended)

    async def follow(self, plan: BudgetPlan) -> BudgetSource:
        """Have a schedule or signal move the budget until the next `set`; a signal starts now. Returns when what it
        asks for now is in force. Raises `RegulationError` for a signal that cannot be followed."""
        called_s = time.monotonic()
        if isinstance(plan, FollowedSignal):
            plan = replace(plan, started_s=time.time())
            plan.signal()
        async with self.lock:
            core = self._core
            _ = core.ledger
            await core.store(plan=plan)
            self._moving.follow(plan, core.state.budget_w)
            self.move()
            core.divide()
            await self._settled(called_s)
            await self._raised()
            return self.source

    def end(self) -> None:
        """Nothing moves the budget any more: another configuration has been deployed."""
        self._moving.end()

    def move(self) -> None:
        """Bring the budget to what a schedule or signal asks for now."""
        core = self._core
        if core.stopping or not self._moving.moves:
            return
        commands = self._moving.move(core.ledger, core.roster.devices)
        if commands is None:
            return
        core.send(commands)
        now_s = time.monotonic()
        if not core.ledger.in_force(now_s).value and (self._settling is None or self._settling.done()):
            self._settling = asyncio.create_task(self._time_settling(now_s))

    async def _time_settling(self, since_s: float) -> None:
        try:
            self.last_settle_s = await self._settled(since_s)
        except BudgetError as error:
            log.warning("%s", error)

    async def _settled(self, called_s: float) -> float:
        """Wait until all that is charged is within the budget; the time that took, s."""
        ledger = self._core.ledger
        while not (state := ledger.in_force(time.monotonic())).value:
            if time.monotonic() > called_s + SETTLE_DEADLINE_S:
                raise BudgetError(
                    f"the budget is set, but after {SETTLE_DEADLINE_S:g} s caps are still {state.over_w:.0f} W over "
                    f"it: waiting for {', '.join(state.awaited)}; their agents keep trying"
                )
            await asyncio.sleep(0.005)
        return time.monotonic() - called_s

    async def _raised(self) -> None:
        """Give raises a moment to be confirmed, so that what status shows next is what was asked."""
        ledger = self._core.ledger
        until_s = time.monotonic() + RAISE_WAIT_S
        while time.monotonic() < until_s:
            now_s = time.monotonic()
            if all(view.confirmed or view.fixed or not view.uuids for view in ledger.replicas(now_s)):
                return
            await asyncio.sleep(0.01)
