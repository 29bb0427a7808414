"""Budgets that an operator sets, or has a schedule or signal move: written down, and waited for until in force."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from pals_ray.control.budget.moving_budget import BudgetPlan, FollowedSignal
from pals_ray.control.manager.commands import Command
from pals_ray.control.manager.manager_core import ManagerCore
from pals_ray.errors import PalsError
from pals_ray.runtime.manager.storage import StorageError
from pals_ray.types import BudgetChange, BudgetSource

SETTLE_DEADLINE_S = 15.0
RAISE_WAIT_S = 2.0

log = logging.getLogger("pals.manager")


class BudgetError(PalsError):
    """A budget that is no number of watts, or that could not be brought into force."""


class BudgetChanges:
    """Changes the budget of one core. `do` carries its commands out, `written` returns once all is on disk.

    `last_settle_s` is how long the last cut took until every cap was in force.
    """

    def __init__(
        self,
        core: ManagerCore,
        do: Callable[[tuple[Command, ...]], None],
        written: Callable[[], Awaitable[None]],
    ) -> None:
        self._core = core
        self._do = do
        self._written = written
        self._settling: asyncio.Task[None] | None = None
        self.lock = asyncio.Lock()
        self.last_settle_s: float | None = None

    async def set(self, budget_w: float) -> BudgetChange:
        """Set the fleet's budget, W, ending what moved it; returns when every cap is in force."""
        called_s = time.monotonic()
        if isinstance(budget_w, bool) or not isinstance(budget_w, int | float) or not math.isfinite(budget_w):
            raise BudgetError(f"a budget of {budget_w!r} is not a number of watts; ask for one, as in set_budget(2400)")
        async with self.lock:
            core = self._core
            before, before_w, ended = core.record, core.ledger.budget_w, core.moves
            self._do(core.set_budget(float(budget_w), time.monotonic()))
            try:
                await self._written()
            except StorageError:
                self._do(core.restore_budget(before, before_w, time.time(), time.monotonic()))
                raise
            settled_s = await self._take_effect(called_s)
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
            before = core.record
            self._do(core.follow(plan, before.budget_w, time.time(), time.monotonic()))
            try:
                await self._written()
            except StorageError:
                self._do(core.follow(before.plan, before.budget_w, time.time(), time.monotonic()))
                raise
            self.move()
            await self._take_effect(called_s)
            await self._raised()
            return core.source

    def move(self) -> None:
        """Bring the budget to what a schedule or signal asks for now."""
        core, now_s, warned = self._core, time.monotonic(), self._core.source.warning
        commands = core.move_budget(time.time(), now_s)
        if core.source.warning is not None and warned is None:
            log.warning("%s", core.source.warning)
        self._do(commands)
        unsettled = commands and not core.ledger.in_force(now_s).value
        if unsettled and (self._settling is None or self._settling.done()):
            self._settling = asyncio.create_task(self._time_settling(now_s))

    async def _take_effect(self, called_s: float) -> float:
        self._do(self._core.divide(time.monotonic()))
        return await self._settled(called_s)

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
