"""Dividing a budget between replicas' menus: minimum shares first, then one priority class after another.

Small classes are divided by `small_fleet_division`, large ones by `large_fleet_division`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pals_ray.control.allocation.budget_tree import BudgetTree, IntArray
from pals_ray.control.allocation.large_fleet_division import dual_bound, find_prices, round_up, surplus
from pals_ray.control.allocation.menu_table import Division, MenuTable
from pals_ray.control.allocation.small_fleet_division import solve_exactly

#: Up to so many replicas are divided exactly, which takes tens of ms.
EXACT_REPLICAS = 64

#: Divides the budgets, less the watts of all first points, between the menus of one class.
Solver = Callable[[MenuTable, BudgetTree], Division]


def solve(menus: MenuTable, tree: BudgetTree) -> Division:
    """The best division of one class: exact up to `EXACT_REPLICAS`, else within a step or so of each binding budget.

    `tree.budget_w` is whole watts above the first points, none negative.
    """
    price, index = find_prices(menus, tree)
    net = surplus(menus, tree, price)
    bound = dual_bound(net, tree, price)
    index = round_up(menus, tree, price, net, index, bound)
    exact = len(menus) <= EXACT_REPLICAS
    if exact:
        index = solve_exactly(menus, tree, price, net, index)
    value = float(menus.at(index)[1].sum())
    return Division(index, value, value if exact else bound)


@dataclass(frozen=True, slots=True)
class FleetDivision:
    """One point of each menu: `index` (n,), and each class's division by its priority, in order.

    A class's bound is what it could have got at most, given the classes before it.
    """

    index: IntArray
    classes: dict[int, Division]


def divide(
    menus: MenuTable, tree: BudgetTree, priority: IntArray, floor: IntArray, solver: Solver = solve
) -> FleetDivision:
    """Divide the watts above the least charges: minimum shares first, then classes in order of their priority number.

    `tree.budget_w` is whole watts above the least charges; where it is negative, all replicas below stay at their first
    point. `floor` (n,) is each replica's first point at its minimum share. While all of them fit they are a constraint,
    otherwise each class is raised towards them as far as possible.
    """
    short = (tree.members() & (tree.budget_w < 0)[:, None]).any(axis=0)
    tree = replace(tree, budget_w=np.maximum(tree.budget_w, 0.0))
    floor = np.where(short, 0, floor)
    classes = [(number, np.flatnonzero((priority == number) & ~short)) for number in np.unique(priority).tolist()]
    classes = [(number, mine) for number, mine in classes if len(mine)]
    index = floor.copy()
    if (tree.subtotals_w(menus.at(floor)[0]) > tree.budget_w).any():
        index[:] = 0
        for _, mine in classes:
            index[mine] = _raise(menus, tree, index, mine, floor[mine], solver).index
    divisions = {}
    for number, mine in classes:
        divisions[number] = _raise(menus, tree, index, mine, None, solver)
        index[mine] = divisions[number].index
    return FleetDivision(index, divisions)


def _raise(
    menus: MenuTable, tree: BudgetTree, index: IntArray, mine: IntArray, ceiling: IntArray | None, solver: Solver
) -> Division:
    """Raise some replicas from their present points, no further than `ceiling`, while the others stay at theirs."""
    left = replace(tree.above(menus.at(index)[0]), node_of=tree.node_of[mine])
    offered = MenuTable(menus.extra_w[mine], menus.value[mine]) if len(mine) < len(menus) else menus
    first = index[mine]
    last = np.full(len(mine), menus.value.shape[1] - 1) if ceiling is None else ceiling
    if first.any() or ceiling is not None:
        point = np.clip(np.arange(menus.value.shape[1]), first[:, None], last[:, None])
        rows = np.arange(len(mine))[:, None]
        extra_w = offered.extra_w[rows, point]
        offered = MenuTable(extra_w - extra_w[:, :1], offered.value[rows, point])
    division = solver(offered, left)
    return replace(division, index=np.clip(division.index, first, last))
