"""Dividing a budget among many replicas, near the optimum: prices first, then rounding to whole points of the menus.

The linear relaxation of the division has an optimum with one price of a watt per node of the budget tree: a replica
takes the point of its menu's concave envelope where another watt is worth that price. The envelopes are merged by slope
and truncated at each budget, from the innermost out; only their parts around the price matter, and each
`MenuTable.best_at` finds one vertex of those exactly. Rounding then fills the watts that are left with any point that
fits, and swaps pairs. The dual bound of the prices says how far from the optimum the result can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pals_ray.control.allocation.budget_tree import BudgetTree, FloatArray, IntArray
from pals_ray.control.allocation.menu_table import MenuTable

#: The coarse round looks at so many points of a menu, and tries so many prices, evenly spaced in their logarithm.
COARSE_POINTS, COARSE_PRICES = 25, 12
LOWEST = 1e-3
#: The closer round tries these multiples of the price that the coarse one found for each node.
CLOSER_PRICES = np.array([1.4, 1.15, 1.05, 1.0, 0.95, 0.87, 0.7])
#: Rounding stops at this relative distance from the bound.
CLOSE_ENOUGH = 1e-4
MIN_GAIN = 1e-9
#: Moves that lose at most the first part of what a pair can gain are tried first, then all moves.
LOSS_PARTS = (1 / 16, 1.0)


def find_prices(menus: MenuTable, tree: BudgetTree) -> tuple[FloatArray, IntArray]:
    """The relaxation's prices (nodes,) and the division (n,) that is left when each last, partial step is dropped.

    A node's price of a watt is at least its parent's.
    """
    stride = max(1, menus.extra_w.shape[1] // COARSE_POINTS)
    coarse = MenuTable(*(np.ascontiguousarray(part[:, ::stride]) for part in (menus.extra_w, menus.value)))
    tried = np.tile(_price_range(coarse), (len(tree.parent), 1))
    price, _ = _merge(coarse, tree, tried)
    return _merge(menus, tree, price[:, None] * CLOSER_PRICES)


def dual_bound(net: FloatArray, tree: BudgetTree, price: FloatArray) -> float:
    """What no division's value exceeds: `sum max net + sum (price - parent's price) x budget`, at any such prices."""
    return float(net.max(axis=1).sum() + own_price(tree, price) @ tree.budget_w)


def surplus(menus: MenuTable, tree: BudgetTree, price: FloatArray) -> FloatArray:
    """(n, p): value less watts at the price (nodes,) of the replica's node."""
    return menus.value - price[tree.node_of][:, None] * menus.extra_w


def own_price(tree: BudgetTree, price: FloatArray) -> FloatArray:
    """(nodes,): what each budget adds to the price below it, per W."""
    own: FloatArray = price - np.where(tree.parent >= 0, price[tree.parent], 0.0)
    return own


def _price_range(menus: MenuTable) -> FloatArray:
    """(COARSE_PRICES,): from the steepest gain per watt of all menus down to LOWEST of the usual one."""
    rise = menus.value[:, 1:] - menus.value[:, :1]
    run = menus.extra_w[:, 1:] - menus.extra_w[:, :1]
    slope = np.divide(rise, run, out=np.zeros_like(rise), where=run > 0).max(axis=1, initial=0.0)
    gains = slope[slope > 0]
    if not len(gains):
        return np.ones(1)
    return np.geomspace(gains.max(), LOWEST * np.median(gains), COARSE_PRICES)


def _merge(menus: MenuTable, tree: BudgetTree, tried: FloatArray) -> tuple[FloatArray, IntArray]:
    """Envelopes through the vertices at `tried` (nodes, k) falling prices, merged by slope and truncated bottom-up."""
    n = len(menus)
    rows = np.arange(n)[:, None]
    vertex = np.hstack([0 * rows, menus.best_at(tried[tree.node_of]), menus.value.argmax(axis=1)[:, None]])
    step_w = np.diff(menus.extra_w[rows, vertex], axis=1)
    gain = np.diff(menus.value[rows, vertex], axis=1)
    slope = np.divide(gain, step_w, out=np.full_like(gain, np.inf), where=step_w > 0)
    # Rounding errors must not change the order of collinear steps of one envelope.
    slope = np.minimum.accumulate(slope, axis=1) * (1 - 1e-12 * np.arange(slope.shape[1]))
    replica, column = np.nonzero(step_w > 0)
    step_w, slope = step_w[replica, column], slope[replica, column]
    order = np.argsort(-slope)
    replica, column, step_w, slope = replica[order], column[order], step_w[order], slope[order]

    price = np.zeros(len(tree.parent))
    node = tree.node_of[replica]
    pool: list[IntArray] = [np.flatnonzero(node == v) for v in range(len(tree.parent))]
    whole = np.ones(len(slope), dtype=bool)
    for v in range(len(tree.parent) - 1, -1, -1):
        taken = np.sort(pool[v])
        total_w = np.cumsum(step_w[taken])
        fits = int(np.searchsorted(total_w, tree.budget_w[v], side="right"))
        if fits < len(taken):
            # The step that fits only in part counts as far as it fits, so that outer budgets keep those watts free.
            last = taken[fits]
            price[v], whole[last] = slope[last], False
            step_w[last] = tree.budget_w[v] - (total_w[fits - 1] if fits else 0.0)
            taken = taken[: fits + 1]
        pool[v] = taken
        if v:
            outer = int(tree.parent[v])
            pool[outer] = np.concatenate([pool[outer], taken])
    for v in range(1, len(price)):
        price[v] = max(price[v], price[tree.parent[v]])
    taken = pool[0][whole[pool[0]]]
    index = np.zeros(n, dtype=np.int64)
    np.maximum.at(index, replica[taken], vertex[replica[taken], column[taken] + 1])
    return price, index


@dataclass(frozen=True, slots=True)
class _Moves:
    """Points that replicas could change to, by rising watts; one of them has no replica (-1) and changes nothing."""

    replica: IntArray
    point: IntArray
    more_w: FloatArray
    gain: FloatArray


class _Rounding:
    """A division in progress: the points taken and the watts left in each budget."""

    def __init__(
        self, menus: MenuTable, tree: BudgetTree, price: FloatArray, net: FloatArray, index: IntArray, bound: float
    ) -> None:
        self.menus, self.tree, self.price, self.net, self.bound = menus, tree, price, net, bound
        self.index = index.copy()
        self.extra_w, self.value = menus.at(index)
        self.left_w = tree.budget_w - tree.subtotals_w(self.extra_w)
        self.path = tree.paths()
        # The budget that sets a node's price is the outermost one with that price.
        self.setter = np.zeros(len(price), dtype=np.int64)
        for v in range(1, len(price)):
            same = price[v] == price[tree.parent[v]]
            self.setter[v] = self.setter[tree.parent[v]] if same else v

    def close_enough(self) -> bool:
        """Whether the bound leaves no more than a trifle to gain."""
        return bool(self.bound - self.value.sum() <= CLOSE_ENOUGH * abs(self.bound))

    def use_left_over(self, v: int, mine: IntArray) -> None:
        """Change one or two of the replicas (k,) priced by budget `v` at a time, while that gains."""
        net = self.net[mine]
        most = net.max(axis=1)
        for part in LOSS_PARTS:
            while self.left_w[v] > 0 and not self.close_enough():
                # Two moves gain at most the price of the watts left, less what they lose at that price.
                now = net[np.arange(len(mine)), self.index[mine]]
                most_loss = part * (self.price[v] * self.left_w[v] + (most - now).max())
                row, point = np.nonzero(net >= (now - most_loss)[:, None])
                pair = self._best_pair(self._moves(v, mine[row], point), self.left_w[v])
                if not pair or not self._take(pair):
                    break

    def _moves(self, v: int, replica: IntArray, point: IntArray) -> _Moves:
        """The given points, by rising watts, less those that a budget below `v` has no room for."""
        more_w = self.menus.extra_w[replica, point] - self.extra_w[replica]
        fits = more_w <= self._room_below_w(v)[self.tree.node_of[replica]]
        replica, point, more_w = replica[fits], point[fits], more_w[fits]
        gain = self.menus.value[replica, point] - self.value[replica]
        order = np.argsort(more_w)
        start = int(np.searchsorted(more_w[order], 0.0))
        return _Moves(
            np.insert(replica[order], start, -1),
            np.insert(point[order], start, 0),
            np.insert(more_w[order], start, 0.0),
            np.insert(gain[order], start, 0.0),
        )

    def _room_below_w(self, v: int) -> FloatArray:
        """(nodes,): watts that one replica could take within the budgets below `v`; inf right below it."""
        room_w = np.full(len(self.path), np.inf)
        for u in range(v + 1, len(room_w)):
            room_w[u] = min(room_w[self.tree.parent[u]], self.left_w[u])
        return room_w

    @staticmethod
    def _best_pair(moves: _Moves, left_w: float) -> list[tuple[int, int]]:
        """The one or two moves, of different replicas, that gain most within the watts left."""
        most = np.maximum.accumulate(moves.gain)
        best = np.maximum.accumulate(np.where(moves.gain >= most, np.arange(len(most)), 0))
        partner = np.searchsorted(moves.more_w, left_w - moves.more_w, side="right") - 1
        b = best[np.maximum(partner, 0)]
        both = moves.gain + moves.gain[b]
        both[(partner < 0) | (moves.replica == moves.replica[b])] = 0.0
        a = int(both.argmax())
        if both[a] <= MIN_GAIN:
            return []
        return [(int(moves.replica[i]), int(moves.point[i])) for i in (a, int(b[a])) if moves.replica[i] >= 0]

    def _take(self, moves: list[tuple[int, int]]) -> bool:
        """Take the given (replica, point) together if every budget still holds."""
        left_w = self.left_w.copy()
        for r, j in moves:
            left_w[self.path[self.tree.node_of[r]]] -= self.menus.extra_w[r, j] - self.extra_w[r]
        if (left_w < 0).any():
            return False
        self.left_w = left_w
        for r, j in moves:
            self.index[r], self.extra_w[r], self.value[r] = j, self.menus.extra_w[r, j], self.menus.value[r, j]
        return True


def round_up(
    menus: MenuTable, tree: BudgetTree, price: FloatArray, net: FloatArray, index: IntArray, bound: float
) -> IntArray:
    """A better division (n,) than `index`, within every budget, by points that fit and pairs that swap.

    `net` (n, p) is value less watts at the price (nodes,) of each replica's node, `bound` the dual bound.
    """
    rounding = _Rounding(menus, tree, price, net, index, bound)
    setter = rounding.setter[tree.node_of]
    for v in range(len(price) - 1, -1, -1):
        mine = np.flatnonzero(setter == v)
        if price[v] > 0 and len(mine):
            rounding.use_left_over(v, mine)
    return rounding.index
