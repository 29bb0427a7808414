"""How fast a newly ordered cap takes effect."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.models.physics.cap_settling import settled_cap_w


@given(st.floats(100, 700), st.floats(100, 700), st.floats(0, 2), st.floats(0, 1))
def test_a_cap_settles_monotonically_between_old_and_new(before_w, ordered_w, since_s, later_s):
    low, high = sorted((before_w, ordered_w))
    early, late = (settled_cap_w(before_w, ordered_w, t) for t in (since_s, since_s + later_s))
    assert low - 1e-9 <= early <= high + 1e-9
    assert abs(late - ordered_w) <= abs(early - ordered_w) + 1e-9
    assert settled_cap_w(before_w, ordered_w, 5.0) == pytest.approx(ordered_w)


def test_down_is_fast_and_up_is_slow():
    assert settled_cap_w(300, 200, 0.05) == pytest.approx(200)
    assert settled_cap_w(200, 300, 0.10) == pytest.approx(200)
    assert settled_cap_w(200, 300, 0.33) >= 289
