"""The best division of a budget among up to some 64 replicas, by dynamic programming over whole watts.

The tables of replicas are joined node by node, from the innermost budgets to the fleet's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pals_ray.control.allocation.budget_tree import BudgetTree, FloatArray, IntArray
from pals_ray.control.allocation.large_fleet_division import own_price
from pals_ray.control.allocation.menu_table import MenuTable

#: Values closer than this are the same.
TOLERANCE = 1e-9


@dataclass(slots=True)
class _Table:
    """The best value of some replicas by the watts they take together: `value[i]` at `low_w + i`, -inf where none."""

    low_w: int
    value: FloatArray

    def pruned(self, price: float, least_net: float, budget_w: float) -> _Table:
        """Without sums over the budget, and without those that no division better than the incumbent contains."""
        value = self.value[: max(0, int(budget_w) - self.low_w + 1)]
        watts = self.low_w + np.arange(len(value))
        kept = value - price * watts >= least_net
        where = np.flatnonzero(kept)
        if not len(where):
            return _Table(0, np.empty(0))
        window = slice(where[0], where[-1] + 1)
        return _Table(self.low_w + int(where[0]), np.where(kept, value, -np.inf)[window])

    def options(self) -> _Options:
        """The watts whose value no fewer watts reach, as options for the budget above."""
        below = np.maximum.accumulate(np.concatenate([[-np.inf], self.value[:-1]]))
        where = np.flatnonzero(self.value > below)
        return _Options(self.low_w + where, self.value[where])

    def plus(self, options: _Options) -> _Table:
        """With one more replica or part of the tree: the (max, +) convolution."""
        low_w, span = int(options.extra_w[0]), int(options.extra_w[-1] - options.extra_w[0])
        joined = np.full(len(self.value) + span, -np.inf)
        for extra_w, value in zip((options.extra_w - low_w).tolist(), options.value.tolist(), strict=True):
            part = joined[extra_w : extra_w + len(self.value)]
            np.maximum(part, self.value + value, out=part)
        return _Table(self.low_w + low_w, joined)

    def split(self, options: _Options, watts: int) -> int:
        """Which option `plus` took to reach these watts."""
        at = watts - options.extra_w - self.low_w
        inside = (at >= 0) & (at < len(self.value))
        total = np.where(inside, self.value[np.where(inside, at, 0)] + options.value, -np.inf)
        return int(total.argmax())


@dataclass(frozen=True, slots=True)
class _Options:
    """Rising watts with rising values: of one replica's points, or of a part of the tree."""

    extra_w: IntArray
    value: FloatArray
    index: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def _replica_options(extra_w: FloatArray, value: FloatArray, loss: FloatArray, gap: float) -> _Options:
    """The points of one menu that no cheaper one beats and whose loss at the prices is within the gap."""
    below = np.maximum.accumulate(np.concatenate([[-np.inf], value[:-1]]))
    index = np.flatnonzero((value > below) & (loss <= gap))
    index = index[np.diff(extra_w[index], append=np.inf) > 0]  # the last of equal watts is the best of them
    return _Options(extra_w[index].astype(np.int64), value[index], index)


def solve_exactly(
    menus: MenuTable, tree: BudgetTree, price: FloatArray, net: FloatArray, incumbent: IntArray
) -> IntArray:
    """The optimum (n,), never worse than `incumbent`.

    `net` (n, p) is value less watts at the price (nodes,) of each replica's node. The prices prove an upper bound.
    Points and partial sums that lose more at these prices than the incumbent is short of that bound are left out, for
    no better division contains them (reduced-cost fixing).
    """
    most = net.max(axis=1)
    own = own_price(tree, price)
    bound = most.sum() + own @ tree.budget_w
    gap = bound - menus.at(incumbent)[1].sum() + TOLERANCE * (1.0 + abs(bound))
    children: list[list[int]] = [[] for _ in tree.parent]
    for v in range(1, len(tree.parent)):
        children[tree.parent[v]].append(v)
    best: list[float] = [0.0] * len(children)
    finished: list[_Options] = [_Options(np.zeros(1, dtype=np.int64), np.zeros(1))] * len(children)
    steps: list[list[tuple[_Table, _Options, int]]] = [[] for _ in children]
    for v in range(len(children) - 1, -1, -1):
        table, above = _Table(0, np.zeros(1)), price[tree.parent[v]] if v else 0.0
        mine = np.flatnonzero(tree.node_of == v)
        joined = [(_replica_options(menus.extra_w[r], menus.value[r], most[r] - net[r], gap), int(r)) for r in mine]
        joined += [(finished[c], ~c) for c in children[v]]
        for options, who in joined:
            steps[v].append((table, options, who))
            best[v] += most[who] if who >= 0 else best[~who]
            table = table.plus(options).pruned(price[v], best[v] - gap, tree.budget_w[v])
            if not len(table.value):
                return incumbent
        best[v] += own[v] * tree.budget_w[v]
        table = table.pruned(above, best[v] - gap, tree.budget_w[v])
        if not len(table.value):
            return incumbent
        finished[v] = table.options()

    index = incumbent.copy()
    pending = [(0, int(finished[0].extra_w[-1]))]
    while pending:
        v, watts = pending.pop()
        for before, options, who in reversed(steps[v]):
            k = before.split(options, watts)
            watts -= int(options.extra_w[k])
            if who >= 0:
                index[who] = options.index[k]
            else:
                pending.append((~who, int(options.extra_w[k])))
    return index
