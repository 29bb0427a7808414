"""The oracle's search: what it finds is what trying every point would find."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pals_ray.simulation.oracle import Tried, best_fixed, best_flat_out, highest
from pals_ray.types import OperatingPoint

CAPS_W = [float(w) for w in range(100, 401, 5)]
BATCHES = (1, 2, 4, *range(8, 129, 8))


class World:
    """Points of a made-up engine: each batch attains from its own cap on, watts rise with the cap; counts tries."""

    def __init__(self, least_w, reached=10_000, flat_out=False):
        self.least_w = least_w
        self.reached = reached
        self.flat_out = flat_out
        self.tried = []

    def try_at(self, point):
        self.tried.append(point)
        attains = point.cap_w >= self.least_w(min(point.batch_limit, self.reached))
        if self.flat_out:
            # Served and drawn: both rise with the cap, so that their ratio has a peak.
            efficiency = point.batch_limit * point.cap_w / (40_000.0 + point.cap_w**2)
        else:
            efficiency = 1.0 / (point.cap_w + 0.001 * point.batch_limit)
        return Tried(point, attains, efficiency, min(point.batch_limit, self.reached))

    def best_of_all(self):
        tried = [self.try_at(OperatingPoint(cap_w, batch)) for cap_w in CAPS_W for batch in BATCHES]
        return max((t.tokens_per_joule for t in tried if t.attains), default=None)


def valley(at, depth_w, steep):
    """The least cap by batch: lowest at one batch, higher on both sides (too slow above, too few places below)."""
    return lambda batch: depth_w + steep * abs(batch - at)


@given(st.sampled_from(BATCHES), st.floats(90.0, 500.0), st.floats(0.1, 30.0), st.integers(1, 200))
def test_the_best_fixed_point_is_the_best_of_all_of_them(at, depth_w, steep, reached):
    world = World(valley(at, depth_w, steep), reached)
    found, count = best_fixed(world.try_at, CAPS_W, BATCHES), len(world.tried)
    best = world.best_of_all()
    assert (found is None) == (best is None)
    if found is not None:
        assert found.attains
        # A limit that nothing reaches is not lowered further: a thousandth of a watt for each place here.
        assert 1.0 / found.tokens_per_joule <= 1.0 / best + 0.001 * max(BATCHES)
        assert count < len(CAPS_W) * len(BATCHES) / 4


@given(st.floats(0.0, 450.0))
def test_flat_out_the_best_point_may_have_a_higher_cap_than_it_needs(least_w):
    world = World(lambda _: least_w, flat_out=True)
    found = best_flat_out(world.try_at, CAPS_W, BATCHES)
    best = world.best_of_all()
    assert (found is None) == (best is None)
    if found is not None:
        assert found.tokens_per_joule == best
        assert found.point.batch_limit == max(BATCHES)


@given(st.integers(-5, 40), st.integers(0, 30))
def test_the_highest_number_that_attains_is_found(limit, high):
    tried = []

    def attains(number):
        tried.append(number)
        return number <= limit

    found = highest(attains, 0, high)
    assert found == (None if limit < 0 else min(limit, high))
    assert len(tried) <= 7
