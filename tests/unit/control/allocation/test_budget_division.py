"""Dividing watts between menus: near the optimum, inside every budget, classes and minimum shares in order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals_ray.control.allocation import budget_division
from pals_ray.control.allocation.budget_division import divide, solve
from pals_ray.control.allocation.budget_tree import BudgetTree
from pals_ray.control.allocation.large_fleet_division import dual_bound, find_prices, surplus
from pals_ray.control.allocation.menu_table import MenuTable


def tree_of(budgets_w, parent, node_of):
    names = tuple(map(str, range(len(parent))))
    return BudgetTree(names, np.array(parent), np.array(budgets_w, dtype=float), np.array(node_of))


def best_by_trying_all(menus, tree):
    best = -np.inf
    for index in itertools.product(range(menus.value.shape[1]), repeat=len(menus)):
        extra_w, value = menus.at(np.array(index))
        if (tree.subtotals_w(extra_w) <= tree.budget_w).all():
            best = max(best, value.sum())
    return best


@st.composite
def problems(draw, most_replicas=5, most_points=5):
    n, p = draw(st.integers(1, most_replicas)), draw(st.integers(1, most_points))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    extra_w = np.sort(rng.integers(0, draw(st.sampled_from([3, 40, 400])), (n, p)), axis=1).astype(float)
    extra_w[:, 0] = 0.0
    value = rng.normal(size=(n, p)).round(draw(st.sampled_from([0, 6])))
    if draw(st.booleans()):
        value = np.sort(value, axis=1)
    parent = [-1, 0, 0, 1, 1]
    node_of = rng.integers(0, 5, n)
    tree = tree_of(np.zeros(5), parent, node_of)
    range_w = tree.subtotals_w(extra_w[:, -1])
    return MenuTable(extra_w, value), tree_of(np.floor(range_w * rng.uniform(0, 1.1, 5)), parent, node_of)


def plain(menus):
    return np.zeros(len(menus), dtype=np.int64), np.zeros(len(menus), dtype=np.int64)


@given(problem=problems())
@settings(max_examples=200)
def test_a_small_fleet_gets_the_optimum(problem):
    menus, tree = problem
    division = solve(menus, tree)
    extra_w, value = menus.at(division.index)
    assert (tree.subtotals_w(extra_w) <= tree.budget_w).all()
    assert value.sum() == pytest.approx(division.value)
    assert division.value == pytest.approx(best_by_trying_all(menus, tree), abs=1e-7)


@given(problem=problems(most_replicas=90, most_points=60))
@settings(max_examples=60)
def test_a_large_fleet_stays_inside_every_budget_and_under_its_bound(problem):
    menus, tree = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget_division, "EXACT_REPLICAS", 0)
        rounded = solve(menus, tree)
    extra_w, value = menus.at(rounded.index)
    assert (tree.subtotals_w(extra_w) <= tree.budget_w).all()
    assert value.sum() == pytest.approx(rounded.value)
    assert rounded.value <= rounded.bound + 1e-9
    assert solve(menus, tree).value >= rounded.value - 1e-9


@given(problem=problems(), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_the_dual_bound_holds_at_any_prices(problem, seed):
    menus, tree = problem
    price = np.random.default_rng(seed).exponential(0.1, len(tree.parent))
    for v in range(1, len(price)):
        price[v] = max(price[v], price[tree.parent[v]])
    for prices in (price, find_prices(menus, tree)[0]):
        assert dual_bound(surplus(menus, tree, prices), tree, prices) >= best_by_trying_all(menus, tree) - 1e-9


@given(problem=problems(), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_classes_and_shares_keep_every_budget_that_can_be_kept(problem, seed):
    menus, tree = problem
    rng = np.random.default_rng(seed)
    priority = rng.integers(0, 3, len(menus))
    floor = rng.integers(0, menus.value.shape[1], len(menus))
    tree.budget_w[rng.integers(0, 5)] -= rng.integers(0, 20)
    index = divide(menus, tree, priority, floor).index
    spent_w = tree.subtotals_w(menus.at(index)[0])
    keepable = np.maximum(tree.budget_w, 0.0)
    assert (spent_w <= keepable).all()


def test_a_higher_class_is_served_before_a_lower_one_that_values_watts_more():
    menus = MenuTable(np.array([[0.0, 100.0], [0.0, 100.0]]), np.array([[0.0, 1.0], [0.0, 5.0]]))
    tree = tree_of([100], [-1], [0, 0])
    _, floor = plain(menus)
    assert divide(menus, tree, np.array([0, 1]), floor).index.tolist() == [1, 0]
    assert divide(menus, tree, np.array([0, 0]), floor).index.tolist() == [0, 1]


def test_a_lower_class_keeps_its_minimum_share_while_the_higher_one_is_short():
    ramp_w = np.array([[0.0, 50.0, 100.0]] * 2)
    menus = MenuTable(ramp_w, ramp_w / 100)
    tree = tree_of([120], [-1], [0, 0])
    division = divide(menus, tree, np.array([0, 1]), np.array([0, 1]))
    assert division.index.tolist() == [1, 1]


def test_shares_that_do_not_fit_are_met_in_order_of_priority():
    ramp_w = np.array([[0.0, 50.0, 100.0]] * 3)
    menus = MenuTable(ramp_w, ramp_w / 100)
    division = divide(menus, tree_of([110], [-1], [0, 0, 0]), np.array([2, 0, 1]), np.array([1, 1, 1]))
    assert division.index.tolist() == [0, 1, 1]


def test_below_a_budget_under_its_least_charges_everybody_stays_at_the_first_point():
    menus = MenuTable(np.array([[0.0, 50.0]] * 2), np.array([[0.0, 1.0]] * 2))
    tree = tree_of([100, -20], [-1, 0], [0, 1])
    priority, floor = plain(menus)
    assert divide(menus, tree, priority, floor).index.tolist() == [1, 0]


def test_each_class_reports_its_value_and_bound():
    menus = MenuTable(np.array([[0.0, 50.0]] * 2), np.array([[0.0, 1.0], [0.25, 2.0]]))
    _, floor = plain(menus)
    classes = divide(menus, tree_of([60], [-1], [0, 0]), np.array([0, 7]), floor).classes
    assert [(priority, c.value, c.bound) for priority, c in classes.items()] == [(0, 1.0, 1.0), (7, 0.25, 0.25)]
