"""What is recorded during a run: samples of every replica, and how the budget is kept."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pals_ray.control.charge import EPS_W
from pals_ray.simulation.engine.scheduler import Engine
from pals_ray.simulation.results.run_result import Cut


class Samples:
    """Series of all replicas, (replicas, samples) each; sample k is taken at (k + 1) x interval."""

    NAMES = ("power_w", "cap_w", "batch_limit", "running", "waiting", "tokens_per_s", "binding")

    def __init__(self, engines: list[Engine], interval_s: float, count: int) -> None:
        self.series = {name: np.zeros((len(engines), count), dtype=np.float32) for name in self.NAMES}
        self.taken = 0
        self._engines = engines
        self._interval_s = interval_s
        self._last = [(0.0, 0, 0.0)] * len(engines)

    @property
    def full(self) -> bool:
        """Whether all are taken."""
        return self.taken == self.series["power_w"].shape[1]

    def take(self, now_s: float) -> None:
        """Take the next sample of all of them."""
        k, interval_s = self.taken, self._interval_s
        self.taken += 1
        rows = []
        for i, engine in enumerate(self._engines):
            engine.read(now_s)
            counted, before = (engine.energy_j, engine.generated, engine.binding_s), self._last[i]
            power_w, tokens_per_s, binding = ((n - b) / interval_s for n, b in zip(counted, before, strict=True))
            state = (engine.cap.ordered_w, engine.batch_limit, engine.running, engine.queued)
            rows.append((power_w, *state, tokens_per_s, binding))
            self._last[i] = counted
        for name, column in zip(self.NAMES, zip(*rows, strict=True), strict=True):
            self.series[name][:, k] = column


class BudgetRecord:
    """Compares the charge with the budget at every instant, and times the budget's cuts. W at node level.

    The charge is that of the limits really in force, whatever the manager knows of them.
    """

    def __init__(self, budget_w: float, reserve_w: float, fixed_w: float) -> None:
        """`fixed_w` is the charge of parked GPUs."""
        self.charge_w = fixed_w
        self.over_s = 0.0
        self.cuts: list[Cut] = []
        self._reserve_w = reserve_w
        self._times_s = [0.0]
        self._budgets_w = [budget_w]
        self._charges_w: dict[str, float] = {}
        self._since_s = 0.0

    @property
    def budget_w(self) -> float:
        """The budget now, W."""
        return self._budgets_w[-1]

    def budget_at(self, time_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """The budget at each of these times, W."""
        return np.array([self._budgets_w[bisect_right(self._times_s, t) - 1] for t in time_s.tolist()])

    def charge(self, replica_id: str, charge_w: float, now_s: float) -> None:
        """A replica's limits have changed."""
        self.pass_time(now_s)
        self.charge_w += charge_w - self._charges_w.get(replica_id, 0.0)
        self._charges_w[replica_id] = charge_w
        self._judge(now_s)

    def budget(self, now_s: float, budget_w: float) -> None:
        """The budget has changed."""
        self.pass_time(now_s)
        before_w = self.budget_w
        self._times_s.append(now_s)
        self._budgets_w.append(budget_w)
        if budget_w < before_w:
            self.cuts.append(Cut(now_s, before_w, budget_w, None, 0.0))
        self._judge(now_s)

    def pass_time(self, now_s: float) -> None:
        """Count the time since the last change, if the charge was over the budget in it."""
        if self._over_w() > EPS_W:
            self.over_s += now_s - self._since_s
        self._since_s = now_s

    def _over_w(self) -> float:
        return self.charge_w - (self.budget_w - self._reserve_w)

    def _judge(self, now_s: float) -> None:
        """Bring the last cut up to date, unless it has settled."""
        if not self.cuts or self.cuts[-1].settled_s is not None:
            return
        cut, over_w = self.cuts[-1], self._over_w()
        if over_w > EPS_W:
            self.cuts[-1] = replace(cut, most_over_w=max(cut.most_over_w, over_w))
        else:
            self.cuts[-1] = replace(cut, settled_s=now_s - cut.at_s)
