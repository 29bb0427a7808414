"""The latency feedback: by how much measured percentiles exceed the predicted ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.control.replica.latency_feedback import MOST_LOG, Ratio


def after(ratio, measured_s, predicted_s, beats=1):
    for _ in range(beats):
        ratio = ratio.after(measured_s, predicted_s, 0.5)
    return ratio


def test_the_factor_is_what_is_measured_over_what_was_predicted():
    assert Ratio().factor == 1.0
    assert after(Ratio(), 0.9, 0.3, 100).factor == pytest.approx(3.0)
    assert after(after(Ratio(), 0.9, 0.3, 100), 0.3, 0.3, 6000).factor == pytest.approx(1.0, rel=0.01)


def test_a_prediction_counts_as_long_as_the_window_of_what_is_measured():
    steady = after(Ratio(), 0.3, 0.3, 600)
    # The cap rises: predicted at once, measured over a minute.
    raised = after(steady, 0.3, 0.1, 4)
    assert raised.factor == pytest.approx(1.0, rel=0.02)


def test_while_nothing_is_measured_it_stays():
    ratio = after(Ratio(), 0.9, 0.3, 100)
    assert after(ratio, None, 5.0, 100).factor == ratio.factor


@given(st.lists(st.tuples(st.none() | st.floats(1e-4, 1e3), st.floats(1e-4, 1e3)), max_size=60))
def test_the_factor_is_bounded(looks):
    ratio = Ratio()
    for measured_s, predicted_s in looks:
        ratio = ratio.after(measured_s, predicted_s, 0.5)
        assert abs(math.log(ratio.factor)) <= MOST_LOG + 1e-9
