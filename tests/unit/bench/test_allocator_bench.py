"""The benchmark's instances and figures, at a small size."""

from __future__ import annotations

import numpy as np
import pytest

from pals_ray.bench.allocator import (
    BUDGET_SHARES,
    KINDS,
    POINTS,
    ROWS_AND_RACKS,
    Timing,
    compare_with_exact,
    figures,
    make_menus,
    make_tree,
    time_beats,
    time_division,
)


@pytest.mark.parametrize("kind", KINDS)
def test_generated_fleets_are_as_the_issue_says(kind):
    rng = np.random.default_rng(1)
    menus = make_menus(KINDS[kind], 50, rng)
    assert menus.extra_w.shape == (50, POINTS)
    assert (np.diff(menus.extra_w) >= 0).all()
    tree = make_tree(menus, ROWS_AND_RACKS, BUDGET_SHARES, rng)
    assert len(tree.parent) == 1 + 12
    range_w = tree.subtotals_w(menus.extra_w[:, -1])
    assert tree.budget_w == pytest.approx(BUDGET_SHARES * range_w, abs=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fleet_of_hundreds_is_divided_within_one_percent_of_the_bound(kind):
    timing = time_division(kind, 300, calls=3)
    assert (timing.gap >= -1e-12).all()
    assert timing.gap.max() < 0.01
    assert (timing.ms > 0).all()


def test_small_fleets_get_what_milp_gets():
    timing = compare_with_exact(instances=3)
    assert timing.replicas == 12
    assert np.abs(timing.gap).max() < 1e-5


def test_the_figures_are_of_the_worst_kind():
    def timing(n, *values):
        return Timing(n, "", np.array(values), np.array(values), np.array(values) / 1000)

    of_all = [timing(1000, 1, 2, 9), timing(1000, 3, 4, 5), timing(10000, 7, 7, 7)]
    found = figures(of_all, timing(12, 1, 1, 4))
    assert found["ms_1000"] == 4
    assert found["ms_10000"] == 7
    assert found["dual_gap_1000"] == 0.004
    assert found["dual_gap_1000_max"] == 0.009
    assert (found["gap_mean"], found["gap_max"]) == (0.002, 0.004)


def test_every_beat_is_timed():
    took_ms = time_beats(beats=200)
    assert len(took_ms) == 200
    assert (took_ms > 0).all()
