"""The tree of budgets (fleet, domains within domains) and an even fill of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pals_ray.control.snapshot import Domain, FleetSnapshot, ReplicaSnapshot, Share
from pals_ray.errors import PalsError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FLEET = "the fleet"


@dataclass(frozen=True, slots=True)
class BudgetTree:
    """Nested budgets over n replicas; node 0 is the fleet, and a parent stands before its children.

    `budget_w` is what the replicas below a node may divide (parked charge taken off), `node_of` (n,) the innermost
    node of each replica.
    """

    names: tuple[str, ...]
    parent: IntArray
    budget_w: FloatArray
    node_of: IntArray

    @classmethod
    def of(cls, snapshot: FleetSnapshot) -> BudgetTree:
        """The tree of a snapshot. Raises `PalsError` for a domain that is unknown, named twice or inside itself."""
        domains = _parents_first(snapshot.domains)
        position: dict[str | None, int] = {None: 0} | {d.name: i for i, d in enumerate(domains, start=1)}
        unknown = {r.domain for r in snapshot.replicas} | set(snapshot.parked_charge_w)
        if unknown := unknown - set(position):
            known = ", ".join(d.name for d in domains) or "none"
            raise PalsError(f"domains {sorted(map(str, unknown))} have no budget; declared are: {known}. Declare them.")
        parent = np.array([-1, *(position[d.parent] for d in domains)])
        parked_w = np.zeros(len(parent))
        for name, charge_w in snapshot.parked_charge_w.items():
            parked_w[position[name]] += charge_w
        for node in range(len(parent) - 1, 0, -1):
            parked_w[parent[node]] += parked_w[node]
        budget_w = np.array([snapshot.budget_w, *(d.budget_w for d in domains)]) - parked_w
        node_of = np.array([position[r.domain] for r in snapshot.replicas], dtype=np.int64)
        return cls((FLEET, *(d.name for d in domains)), parent, budget_w, node_of)

    def paths(self) -> list[list[int]]:
        """The nodes from each node up to the fleet."""
        paths: list[list[int]] = []
        for node, parent in enumerate(self.parent.tolist()):
            paths.append([node, *(paths[parent] if parent >= 0 else [])])
        return paths

    def members(self) -> NDArray[np.bool_]:
        """(nodes, n): whether a replica is below a node, at any depth."""
        below: NDArray[np.bool_] = np.arange(len(self.parent))[:, None] == self.node_of
        for node in range(len(self.parent) - 1, 0, -1):
            below[self.parent[node]] |= below[node]
        return below

    def above(self, charge_w: FloatArray) -> BudgetTree:
        """The whole watts that the charges (n,) leave of each budget; negative where they do not fit."""
        return replace(self, budget_w=np.floor(self.budget_w - self.subtotals_w(charge_w) + 1e-9))

    def subtotals_w(self, charge_w: FloatArray) -> FloatArray:
        """(nodes,): the charges (n,) below each node, W."""
        total_w = np.zeros(len(self.parent))
        np.add.at(total_w, self.node_of, charge_w)
        for node in range(len(self.parent) - 1, 0, -1):
            total_w[self.parent[node]] += total_w[node]
        return total_w


def _parents_first(domains: Sequence[Domain]) -> list[Domain]:
    """Domains with each parent before its children."""
    ordered: list[Domain] = []
    placed: set[str | None] = {None}
    left = list(domains)
    while left:
        ready = [d for d in left if d.parent in placed and d.name not in placed]
        if not ready:
            names = ", ".join(d.name for d in left)
            raise PalsError(f"domains {names} do not form a tree: give each one name and a declared parent.")
        ordered.append(ready[0])
        placed.add(ready[0].name)
        left.remove(ready[0])
    return ordered


def fill_evenly(
    tree: BudgetTree, weight: FloatArray, least_w: FloatArray, most_w: FloatArray
) -> tuple[FloatArray, IntArray]:
    """Weighted max-min fair division: `clip(level x weight, least, most)` with the highest level each domain allows.

    Arrays (n,), W. Returns charges (n,) and the node whose budget held each replica's level down, -1 where none did
    (it is at its most charge or has no weight; less than a billionth of the largest is none). Where the least charges
    alone do not fit a node, they are what its replicas get.
    """
    largest = weight.max(initial=0.0)
    weight = np.where(weight > 1e-9 * largest, weight, 0.0) / (largest or 1.0)
    charge_w = least_w.copy()
    held_by = np.full(len(weight), -1)
    members = tree.members()
    open_ = (weight > 0) & (most_w > least_w)
    while open_.any():
        nodes = [v for v in range(len(tree.parent)) if (members[v] & open_).any()]
        levels = {}
        for v in nodes:
            rising = members[v] & open_
            left_w = tree.budget_w[v] - charge_w[members[v] & ~open_].sum()
            levels[v] = _level(weight[rising], least_w[rising], most_w[rising], left_w)
        tightest = min(nodes, key=lambda v: levels[v])
        done = members[tightest] & open_
        charge_w[done] = np.clip(levels[tightest] * weight[done], least_w[done], most_w[done])
        held_by[done] = np.where(charge_w[done] < most_w[done], tightest, -1)
        if np.isinf(levels[tightest]):
            charge_w[open_], held_by[open_] = most_w[open_], -1
            break
        open_ &= ~done
    return charge_w, held_by


def _level(weight: FloatArray, least_w: FloatArray, most_w: FloatArray, left_w: float) -> float:
    """The level at which `clip(level x weight, least, most)` sums to `left_w`; inf where everything fits, else >= 0."""
    below_w, above_w = least_w.sum(), most_w.sum()
    if above_w <= left_w:
        return np.inf
    if below_w >= left_w:
        return 0.0
    # The sum is piecewise linear in the level between knots: find the two knots on either side of `left_w`.
    knots = np.sort(np.concatenate([least_w / weight, most_w / weight]))
    low, high = 0, len(knots) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if (at_w := np.clip(knots[middle] * weight, least_w, most_w).sum()) <= left_w:
            low, below_w = middle, at_w
        else:
            high, above_w = middle, at_w
    return float(knots[low] + (knots[high] - knots[low]) * (left_w - below_w) / (above_w - below_w))


def bounds_w(snapshot: FleetSnapshot) -> tuple[FloatArray, FloatArray]:
    """(least, most) charge of each replica, (n,) W; a parked replica's most is its least."""
    least_w = np.array([r.least_charge_w for r in snapshot.replicas], dtype=float)
    most_w = np.array([r.least_charge_w if r.parked else r.most_charge_w for r in snapshot.replicas], dtype=float)
    return least_w, most_w


def shares_in_stages(
    snapshot: FleetSnapshot,
    stages: Sequence[tuple[FloatArray, FloatArray]],
    describe: Callable[[int, ReplicaSnapshot, float], str],
) -> dict[str, Share]:
    """Fill the budgets evenly, stage after stage, each with weights and most charges (n,), W.

    `describe` says for a replica's position, the replica and its charge what the share is; what holds the charge there
    is added.
    """
    tree = BudgetTree.of(snapshot)
    charge_w, _ = bounds_w(snapshot)
    held_by = np.full(len(charge_w), -1)
    for weight, most_w in stages:
        charge_w, held = fill_evenly(tree, weight, charge_w, most_w)
        held_by = np.where(held_by >= 0, held_by, held)
    return {
        r.replica_id: Share(w, f"{describe(i, r, w)}, {_held_reason(tree, r, w, v)}")
        for i, (r, w, v) in enumerate(zip(snapshot.replicas, charge_w.tolist(), held_by.tolist(), strict=True))
    }


def gpu_counts(snapshot: FleetSnapshot) -> FloatArray:
    """(n,): GPUs of each replica."""
    return np.array([r.num_gpus for r in snapshot.replicas], dtype=float)


def _held_reason(tree: BudgetTree, replica: ReplicaSnapshot, charge_w: float, held_by: int) -> str:
    """What keeps a replica's charge where it is, in words."""
    if replica.parked:
        return "its least: it is parked"
    if charge_w >= replica.most_charge_w:
        return "its most"
    within = f"{tree.names[held_by]}'s {tree.budget_w[held_by]:.0f} W are divided" if held_by >= 0 else "nothing asked"
    return f"its least: {within}" if charge_w <= replica.least_charge_w else within
