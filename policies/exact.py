"""The true optimum, by mixed-integer programming: for evaluation (seconds, not milliseconds)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, vstack

from pals_ray.control.allocation.budget_tree import BudgetTree
from pals_ray.control.allocation.menu_table import Division, MenuTable
from pals_ray.control.allocation.policy_shares import best_shares
from pals_ray.control.snapshot import FleetSnapshot, Share
from pals_ray.errors import PalsError
from pals_ray.models.power_model import PowerModel

#: Relative distance from the optimum at which the solver may stop.
REL_GAP = 1e-6


def allocate(snapshot: FleetSnapshot, models: Mapping[str, PowerModel]) -> dict[str, Share]:
    """The division of the highest value, whatever is in force now."""
    return best_shares(snapshot, models, solver=solve, keep_present=False)


def solve(menus: MenuTable, tree: BudgetTree) -> Division:
    """The optimum of one class, a binary variable for each point. Raises `PalsError` where the solver gives up."""
    n, p = menus.value.shape
    replica, column = np.repeat(np.arange(n), p), np.arange(n * p)
    one_each = coo_array((np.ones(n * p), (replica, column)), shape=(n, n * p))
    below, variable = np.nonzero(tree.members()[:, replica])
    watts = coo_array((menus.extra_w.ravel()[variable], (below, variable)), shape=(len(tree.parent), n * p))
    found = milp(
        -menus.value.ravel(),
        integrality=np.ones(n * p),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(
            vstack([one_each, watts]).tocsr(),
            np.concatenate([np.ones(n), np.full(len(tree.parent), -np.inf)]),
            np.concatenate([np.ones(n), tree.budget_w]),
        ),
        options={"mip_rel_gap": REL_GAP},
    )
    if found.x is None:
        raise PalsError(f"scipy.optimize.milp found no division of {n} menus: {found.message}. Use policies.pals.")
    index = found.x.reshape(n, p).argmax(axis=1)
    return Division(index, float(menus.at(index)[1].sum()), -float(found.mip_dual_bound))
