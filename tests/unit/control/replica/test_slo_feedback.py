"""The SLO feedback: it leads the share of late requests to what the SLO allows, whatever the model predicts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.control.replica.slo_feedback import LEAST, MOST, SloFeedback
from pals_ray.types import Slo, Verdicts

SLO = Slo(ttft_s=2.0, tpot_s=0.1)


def after(state, good, late, servable=True, slo=SLO):
    verdicts = (state.seen or Verdicts()) + Verdicts(good=good, late_ttft=late)
    return state.after(verdicts, slo, 0.5, servable=servable)


def led(edge, per_beat=5, beats=4000, seed=1):
    """A replica whose requests are late the more the further strain is below `edge`: the share late, and the strain."""
    rng = np.random.default_rng(seed)
    state, late, judged = after(SloFeedback(), 0, 0), 0, 0
    for beat in range(beats):
        chance = min(0.01 * np.exp((edge - state.strain) / 0.02), 0.5)
        missed = int(rng.binomial(per_beat, chance))
        state = after(state, per_beat - missed, missed)
        if beat > beats / 2:
            late, judged = late + missed, judged + per_beat
    return late / judged, state.strain


@pytest.mark.parametrize("edge", [-0.2, 0.0, 0.3])
def test_it_finds_the_edge_from_either_side(edge):
    late, strain = led(edge)
    assert 0.003 <= late <= 0.012
    assert strain == pytest.approx(edge, abs=0.06)


def test_a_cluster_of_late_requests_counts_as_few():
    one, many = after(after(SloFeedback(), 500, 0), 4, 1), after(after(SloFeedback(), 500, 0), 4, 50)
    assert 0.0 < one.strain < many.strain < 50 * one.strain / 2


def test_what_no_point_could_have_served_raises_nothing():
    burst = after(after(SloFeedback(), 0, 0), 0, 200, servable=False)
    assert burst.strain <= 0.0


def test_nothing_is_given_back_while_the_budget_is_overspent():
    spent = after(after(SloFeedback(), 0, 0), 400, 40)
    assert after(spent, 50, 0).strain == pytest.approx(spent.strain, rel=0.01)
    calm = after(after(SloFeedback(), 0, 0), 400, 0)
    assert after(calm, 50, 0).strain < calm.strain


def test_an_engine_that_began_anew_and_an_slo_without_limits_teach_nothing():
    state = after(after(SloFeedback(), 0, 0), 300, 30)
    assert state.after(Verdicts(good=1), SLO, 0.5, servable=True).strain == state.strain
    assert after(SloFeedback(), 5, 5, slo=Slo()).strain == 0.0


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500), st.booleans()), max_size=50))
def test_strain_stays_in_its_range(looks):
    state = SloFeedback()
    for good, late, servable in looks:
        state = after(state, good, late, servable)
        assert LEAST <= state.strain <= MOST
