"""From prices to a division in whole points: left-over watts filled by any point that fits, and pairs swapped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pals_ray.control.allocation.budget_tree import BudgetTree, FloatArray, IntArray
from pals_ray.control.allocation.menu_table import Menus

#: Rounding stops at this relative distance from the bound.
CLOSE_ENOUGH = 1e-4
MIN_GAIN = 1e-9
#: Moves are tried in order of what they can lose: first those within this part of what a pair can gain, then all.
LOSS_PARTS = (1 / 16, 1.0)


@dataclass(frozen=True, slots=True)
class _Moves:
    """Points that replicas could change to, by rising watts; one is nobody's (-1) and changes nothing."""

    replica: IntArray
    point: IntArray
    more_w: FloatArray
    gain: FloatArray


class _Rounding:
    """A division under way: points taken and watts left in each budget."""

    def __init__(
        self, menus: Menus, tree: BudgetTree, price: FloatArray, net: FloatArray, index: IntArray, bound: float
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
        order = np.concatenate([order[:start], [-1], order[start:]])
        nobody = order < 0
        return _Moves(
            np.where(nobody, -1, replica[order]),
            point[order],
            np.where(nobody, 0.0, more_w[order]),
            np.where(nobody, 0.0, gain[order]),
        )

    def _room_below_w(self, v: int) -> FloatArray:
        """(nodes,): watts that one replica could take within the budgets below `v`; inf right below it."""
        room_w = np.full(len(self.path), np.inf)
        for u in range(v + 1, len(room_w)):
            room_w[u] = min(room_w[self.tree.parent[u]], self.left_w[u])
        return room_w

    @staticmethod
    def _best_pair(moves: _Moves, left_w: float) -> list[tuple[int, int]]:
        """The two moves of different replicas that gain most within the watts left; one of them may be nobody's."""
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
    menus: Menus, tree: BudgetTree, price: FloatArray, net: FloatArray, index: IntArray, bound: float
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
