"""What is written down while a run goes on: samples of every replica, violations, and how the budget is kept."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pals_ray.control.charge import EPS_W
from pals_ray.control.slo import QosState, observe, tally_of
from pals_ray.simulation.engine.scheduler import Engine
from pals_ray.simulation.results.run_result import Cut, QosInterval
from pals_ray.types import Target

#: How often the violations' account looks at the engines, s.
QOS_LOOK_S = 1.0


class Samples:
    """Series of all replicas, (replicas, samples) each; sample k is taken at (k + 1) x interval."""

    NAMES = ("power_w", "cap_w", "batch_limit", "running", "waiting", "tokens_per_s", "binding")

    def __init__(self, engines: list[Engine], interval_s: float, count: int) -> None:
        self.series = {name: np.zeros((len(engines), count), dtype=np.float32) for name in self.NAMES}
        self.energy_j = np.zeros((len(engines), count))
        self.taken = 0
        self._engines = engines
        self._interval_s = interval_s
        self._last = [(0.0, 0, 0.0)] * len(engines)

    def take(self, now_s: float) -> None:
        """Take the next sample of all of them."""
        k, interval_s = self.taken, self._interval_s
        self.taken += 1
        rows = []
        for i, engine in enumerate(self._engines):
            engine.read(now_s)
            energy_j, tokens, binding_s = self._last[i]
            rows.append(
                (
                    (engine.energy_j - energy_j) / interval_s,
                    engine.cap.ordered_w,
                    engine.batch_limit,
                    engine.running,
                    engine.queued,
                    (engine.generated - tokens) / interval_s,
                    (engine.binding_s - binding_s) / interval_s,
                )
            )
            self._last[i] = (engine.energy_j, engine.generated, engine.binding_s)
        for name, column in zip(self.NAMES, zip(*rows, strict=True), strict=True):
            self.series[name][:, k] = column


@dataclass(slots=True)
class ModelQos:
    """One model's account of violations."""

    target: Target
    engines: Mapping[str, Engine]
    state: QosState = field(default_factory=QosState)
    intervals: list[QosInterval] = field(default_factory=list)

    def look(self, now_s: float) -> None:
        """Take the engines' tallies in, and judge the interval where it is over."""
        tallies = {}
        for name, engine in self.engines.items():
            engine.advance(now_s)
            tallies[name] = tally_of(engine.telemetry(now_s), self.target)
        judged = self.state.totals.intervals
        self.state = observe(self.state, now_s, tallies, self.target)
        if self.state.totals.intervals > judged and self.state.latest is not None:
            self.intervals.append(QosInterval(now_s, self.state.latest))


class BudgetRecord:
    """The budget and all that is charged, at every instant: cuts, how long they took, and whatever else was over.

    The charge is of the limits really in force, whatever the manager knows. W at node level.
    """

    def __init__(self, budget_w: float, reserve_w: float, fixed_w: float) -> None:
        """`fixed_w` is the charge of parked GPUs."""
        self.charge_w = fixed_w
        self.over_s = 0.0
        self._reserve_w = reserve_w
        self._times_s = [0.0]
        self._budgets_w = [budget_w]
        self._charges_w: dict[str, float] = {}
        self._cuts: list[Cut] = []
        self._open: Cut | None = None
        self._since_s = 0.0

    @property
    def budget_w(self) -> float:
        """The budget now, W."""
        return self._budgets_w[-1]

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """All falls of the budget so far."""
        return (*self._cuts, self._open) if self._open is not None else tuple(self._cuts)

    def budget_at(self, time_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """The budget at each of these times, W."""
        return np.array([self._budgets_w[bisect_right(self._times_s, t) - 1] for t in time_s.tolist()])

    def charge(self, replica_id: str, charge_w: float, now_s: float) -> None:
        """A replica's limits have changed."""
        self._pass(now_s)
        self.charge_w += charge_w - self._charges_w.get(replica_id, 0.0)
        self._charges_w[replica_id] = charge_w
        self._judge(now_s)

    def budget(self, now_s: float, budget_w: float) -> None:
        """The budget has changed."""
        self._pass(now_s)
        before_w = self.budget_w
        self._times_s.append(now_s)
        self._budgets_w.append(budget_w)
        if budget_w < before_w:
            if self._open is not None:
                self._cuts.append(self._open)
            self._open = Cut(now_s, before_w, budget_w, None, 0.0)
        self._judge(now_s)

    def finish(self, now_s: float) -> None:
        """The run is over."""
        self._pass(now_s)

    def _over_w(self) -> float:
        return self.charge_w - (self.budget_w - self._reserve_w)

    def _pass(self, now_s: float) -> None:
        if self._over_w() > EPS_W:
            self.over_s += now_s - self._since_s
        self._since_s = now_s

    def _judge(self, now_s: float) -> None:
        if self._open is None:
            return
        over_w = self._over_w()
        if over_w > EPS_W:
            self._open = replace(self._open, most_over_w=max(self._open.most_over_w, over_w))
        else:
            self._cuts.append(replace(self._open, settled_s=now_s - self._open.at_s))
            self._open = None
