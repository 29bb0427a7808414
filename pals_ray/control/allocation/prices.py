"""Prices of a watt in nested budgets: envelopes merged by slope, truncated bottom-up, and the bound they prove.

The linear relaxation of the division has an optimum with one price per node of the tree: a replica takes the point of
its menu's concave envelope where another watt is worth that price. Of an envelope only the part around the price
matters, so only that is built: each `Menus.best_at` finds one vertex exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pals_ray.control.allocation.budget_tree import BudgetTree, FloatArray, IntArray
from pals_ray.control.allocation.menu_table import Menus

#: The coarse round looks at so many points of a menu and tries so many prices, evenly in their logarithm.
COARSE_POINTS, COARSE_PRICES = 25, 12
LOWEST = 1e-3
#: The closer round tries these multiples of the price that the coarse one found for each node.
CLOSER_PRICES = np.array([1.4, 1.15, 1.05, 1.0, 0.95, 0.87, 0.7])


@dataclass(frozen=True, slots=True)
class Prices:
    """`node` is the price of a watt below each node (at least its parent's), `index` (n,) the rounded-down division."""

    node: FloatArray
    index: IntArray


def find_prices(menus: Menus, tree: BudgetTree) -> Prices:
    """The relaxation's prices and the division that is left when each last, partial step is dropped."""
    stride = max(1, menus.extra_w.shape[1] // COARSE_POINTS)
    coarse = Menus(
        np.ascontiguousarray(menus.extra_w[:, ::stride]),
        np.ascontiguousarray(menus.value[:, ::stride]),
    )
    tried = np.tile(_price_range(coarse), (len(tree.parent), 1))
    return _merge(menus, tree, _merge(coarse, tree, tried).node[:, None] * CLOSER_PRICES)


def dual_bound(net: FloatArray, tree: BudgetTree, price: FloatArray) -> float:
    """What no division's value exceeds: `sum max net + sum (price - parent's price) x budget`, at any such prices."""
    return float(net.max(axis=1).sum() + own_price(tree, price) @ tree.budget_w)


def surplus(menus: Menus, tree: BudgetTree, price: FloatArray) -> FloatArray:
    """(n, p): value less watts at the price (nodes,) of the replica's node."""
    return menus.value - price[tree.node_of][:, None] * menus.extra_w


def own_price(tree: BudgetTree, price: FloatArray) -> FloatArray:
    """(nodes,): what each budget adds to the price below it, per W."""
    own: FloatArray = price - np.where(tree.parent >= 0, price[tree.parent], 0.0)
    return own


def _price_range(menus: Menus) -> FloatArray:
    """(COARSE_PRICES,): from the steepest gain per watt of all menus down to LOWEST of the usual one."""
    rise = menus.value[:, 1:] - menus.value[:, :1]
    run = menus.extra_w[:, 1:] - menus.extra_w[:, :1]
    slope = np.divide(rise, run, out=np.zeros_like(rise), where=run > 0).max(axis=1, initial=0.0)
    gains = slope[slope > 0]
    if not len(gains):
        return np.ones(1)
    return np.geomspace(gains.max(), LOWEST * np.median(gains), COARSE_PRICES)


def _merge(menus: Menus, tree: BudgetTree, tried: FloatArray) -> Prices:
    """Envelopes through the vertices at `tried` (nodes, k) falling prices, merged by slope and truncated bottom-up."""
    n = len(menus)
    rows = np.arange(n)[:, None]
    vertex = np.hstack([0 * rows, menus.best_at(tried[tree.node_of]), menus.value.argmax(axis=1)[:, None]])
    step_w = np.diff(menus.extra_w[rows, vertex], axis=1)
    gain = np.diff(menus.value[rows, vertex], axis=1)
    slope = np.divide(gain, step_w, out=np.full_like(gain, np.inf), where=step_w > 0)
    # Steps of one envelope stay in order whatever rounding errors say of collinear ones.
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
            # The step that fits in part counts as far as it fits, so that budgets further out keep those watts free.
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
    return Prices(price, index)
