"""From a snapshot and its models to shares: menus, their division, spare watts, and whether to adopt it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pals_ray.control.allocation.budget_division import FleetDivision, Solver, divide, solve
from pals_ray.control.allocation.budget_tree import BudgetTree, FloatArray, IntArray, bounds_w, fill_evenly
from pals_ray.control.allocation.division_adoption import adoption
from pals_ray.control.allocation.menu_table import MenuTable
from pals_ray.control.allocation.replica_menu import (
    BINDING,
    HEADROOM,
    VALUE_PER_W,
    ReplicaMenu,
    most_charge_w,
    replica_menu,
)
from pals_ray.control.replica.prediction import MENU_CAPS, predict_range
from pals_ray.control.slo import SERVED
from pals_ray.control.snapshot import FleetSnapshot, ReplicaSnapshot, Share
from pals_ray.models.power_model import PowerModel

#: Falling short is repaired by a raise of at least this share of the present grant.
LEAST_RAISE = 0.01
#: A budget that moved forces a new division if it leaves more than this share of itself free, or fell by more.
FREE_SHARE = 0.002


@dataclass(frozen=True, slots=True)
class FleetMenus:
    """All replicas' menus, in the snapshot's order, over the tree of budgets."""

    replicas: tuple[ReplicaMenu, ...]
    menus: MenuTable
    tree: BudgetTree
    least_w: FloatArray
    most_w: FloatArray
    priority: IntArray
    floor: IntArray

    @classmethod
    def of(
        cls, snapshot: FleetSnapshot, models: Mapping[str, PowerModel], pin_batch_limit: int | None = None
    ) -> FleetMenus:
        """The menus of a fleet of at least one replica; `models` by replica id, else by model name."""
        targets = targets_tokens_per_s(snapshot)
        menus = []
        for r in snapshot.replicas:
            model = models.get(r.replica_id, models.get(r.model))
            if model is None:
                menus.append(_unmodelled(r))
                continue
            surface = predict_range(model, r.min_limit_w, r.max_limit_w, r.max_batch)
            menus.append(replica_menu(r, surface, targets[r.replica_id], pin_batch_limit))
        least_w, _ = bounds_w(snapshot)
        return cls(
            tuple(menus),
            MenuTable(np.array([m.extra_w for m in menus]), np.array([m.value for m in menus])),
            BudgetTree.of(snapshot),
            least_w,
            least_w + np.array([m.most_extra_w for m in menus]),
            np.array([r.target.priority for r in snapshot.replicas]),
            np.array([m.floor for m in menus]),
        )

    def values_by_class(self, value: FloatArray) -> list[float]:
        """Sums of the replicas' values (n,) by class, first class first."""
        return [float(value[self.priority == number].sum()) for number in np.unique(self.priority)]

    def worth(self, charge_w: FloatArray) -> FloatArray:
        """(n,): each replica's best value within a charge (n,), W."""
        within = self.menus.extra_w <= (charge_w - self.least_w)[:, None] + 1e-6
        within[:, 0] = True
        return np.asarray(np.where(within, self.menus.value, -np.inf).max(axis=1))


def targets_tokens_per_s(snapshot: FleetSnapshot) -> dict[str, float | None]:
    """Each replica's part of its model's target: by demand where that is known of all its replicas, else even."""
    parts: dict[str, float | None] = dict.fromkeys(r.replica_id for r in snapshot.replicas)
    for model in {r.model for r in snapshot.replicas}:
        serving = [r for r in snapshot.replicas if r.model == model and not r.parked]
        known = [r.demand_tokens_per_s for r in serving if r.demand_tokens_per_s is not None]
        by_demand = len(known) == len(serving) and sum(known) > 0
        for r in serving:
            whole = r.target.throughput_tokens_per_s
            part = (r.demand_tokens_per_s or 0.0) / sum(known) if by_demand else 1 / len(serving)
            parts[r.replica_id] = None if whole is None else whole * part
    return parts


def falls_short(replica: ReplicaSnapshot, wanted_tokens_per_s: float) -> bool:
    """Whether it served less than was wanted in its last window while requests waited."""
    seen = replica.telemetry
    return seen.waiting > 0 and seen.throughput_tokens_per_s < SERVED * wanted_tokens_per_s


def best_shares(
    snapshot: FleetSnapshot,
    models: Mapping[str, PowerModel],
    solver: Solver = solve,
    pin_batch_limit: int | None = None,
    keep_present: bool = True,
) -> dict[str, Share]:
    """The best division by the models' menus; what nobody needs lies on top as spare, up to each one's most.

    With `keep_present` the grants in force stay unless `adoption` says otherwise.
    """
    if not snapshot.replicas:
        return {}
    fleet = FleetMenus.of(snapshot, models, pin_batch_limit)
    division = divide(fleet.menus, fleet.tree.above(fleet.least_w), fleet.priority, fleet.floor, solver)
    extra_w, value = fleet.menus.at(division.index)
    needed_w = fleet.least_w + extra_w
    gpus = np.array([r.num_gpus for r in snapshot.replicas], dtype=float)
    charge_w, _ = fill_evenly(fleet.tree, gpus, needed_w, np.maximum(fleet.most_w, needed_w))
    why = "the optimum"
    if keep_present:
        adopt, why = _adoption(snapshot, fleet, charge_w, value)
        if not adopt:
            return {r.replica_id: Share(r.grant_w, why) for r in snapshot.replicas}
    near, spare_w = _nearness(division), charge_w - needed_w
    return {
        r.replica_id: Share(float(charge_w[i]), f"{_predicted(m, k)}, {spare_w[i]:.0f} W to spare; {why}; {near}")
        for i, (r, m, k) in enumerate(zip(snapshot.replicas, fleet.replicas, division.index.tolist(), strict=True))
    }


def _adoption(snapshot: FleetSnapshot, fleet: FleetMenus, charge_w: FloatArray, value: FloatArray) -> tuple[bool, str]:
    """Whether to adopt a division with these charges and values (n,), and why."""
    rows = snapshot.replicas
    grant_w = np.array([r.grant_w for r in rows])
    gains = grant_w * (1 + LEAST_RAISE) < charge_w
    binds = np.array([r.telemetry.binding_share >= BINDING for r in rows])
    at_grant = np.array([r.charge_w >= (1 - LEAST_RAISE) * r.grant_w for r in rows])
    costly = (binds & (charge_w < grant_w)).any()
    repairs = [i for i in np.flatnonzero(gains) if falls_short(rows[i], fleet.replicas[i].wanted_tokens_per_s)]
    return adoption(
        _forced(snapshot, fleet, grant_w),
        [rows[i].replica_id for i in repairs],
        fleet.values_by_class(fleet.worth(grant_w)),
        fleet.values_by_class(value),
        [] if costly else [rows[i].replica_id for i in np.flatnonzero(gains & binds & at_grant)],
    )


def _forced(snapshot: FleetSnapshot, fleet: FleetMenus, grant_w: FloatArray) -> str | None:
    """What makes the grants in force untenable."""
    over_w = fleet.tree.subtotals_w(grant_w) - fleet.tree.budget_w
    if (over_w > 1e-6).any():
        v = int(over_w.argmax())
        return f"forced: {fleet.tree.names[v]}'s grants are {over_w[v]:.0f} W over its {fleet.tree.budget_w[v]:.0f} W"
    least_w, most_w = bounds_w(snapshot)
    outside = (grant_w < least_w - 1e-6) | (grant_w > most_w + 1e-6)
    if outside.any():
        return f"forced: {snapshot.replicas[int(outside.argmax())].replica_id} has no grant within its range"
    free_w, much_w = -over_w[0], FREE_SHARE * fleet.tree.budget_w[0]
    # A budget may rise in steps that are each too small for the gain that a new division has to have.
    if snapshot.budget_moved_w != 0.0 and free_w > much_w:
        return f"forced: the budget has moved and leaves {free_w:.0f} W free"
    # The ledger has already shrunk all grants evenly into the smaller budget, regardless of who needs them.
    if snapshot.budget_moved_w < -much_w:
        return f"forced: the budget fell by {-snapshot.budget_moved_w:.0f} W, and all grants with it"
    return None


def _predicted(menu: ReplicaMenu, k: int) -> str:
    if np.isnan(menu.cap_w[k]):
        return "no model yet: every watt of its range counts alike"
    wanted = f"{menu.share[k]:.0%} of {menu.wanted_tokens_per_s:.4g} tokens/s"
    return f"{wanted} predicted at {menu.cap_w[k]:.0f} W a GPU, batch {menu.batch_limit[k]:.0f}"


def _nearness(division: FleetDivision) -> str:
    value, bound = (sum(getattr(c, name) for c in division.classes.values()) for name in ("value", "bound"))
    return f"within {max(bound - value, 0.0) / max(abs(bound), 1e-9):.2%} of the optimum"


def _unmodelled(replica: ReplicaSnapshot) -> ReplicaMenu:
    """The menu of a replica without a model: every watt up to its natural draw is worth the same."""
    natural_w = replica.natural_draw_w or replica.num_gpus * replica.max_limit_w / (1 + HEADROOM)
    most_extra_w = float(np.floor(most_charge_w(replica, natural_w) - replica.least_charge_w))
    share = np.linspace(0.0, 1.0, MENU_CAPS)
    extra_w = np.floor(share * most_extra_w)
    value = replica.target.weight * share - VALUE_PER_W * (replica.least_charge_w + extra_w)
    floor = int(np.searchsorted(extra_w, min(replica.target.burst_floor_w - replica.least_charge_w, most_extra_w)))
    unknown = np.full(len(share), np.nan)
    return ReplicaMenu(extra_w, value, share, unknown, unknown, floor, most_extra_w, np.inf)
