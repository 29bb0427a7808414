"""The agent's side of a grant: what it obeys, for how long, and how far its caps may go."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.control.ledger.lease import LeaseState, Outcome, accept, ceiling_w, fence, tick
from pals_ray.control.snapshot import Overhead
from tests.support.builders import charge_terms, grant

TERMS = charge_terms(gpus=2, node_gpus=4, overhead=Overhead(40.0, 0.05))


def held(now_s: float = 100.0) -> LeaseState:
    return accept(LeaseState(), grant(2, 7, 500.0), now_s)[0]


@pytest.mark.parametrize(
    ("epoch", "seq", "outcome"),
    [
        (2, 8, Outcome.OBEY),
        (3, 1, Outcome.OBEY),
        (2, 7, Outcome.RENEW),
        (2, 6, Outcome.IGNORE),
        (1, 99, Outcome.IGNORE),
    ],
)
def test_only_a_newer_grant_is_obeyed_and_the_same_one_renews_the_lease(epoch, seq, outcome) -> None:
    state, got, _ = accept(held(), grant(epoch, seq, charge_w=900.0), 103.0)
    assert got is outcome
    assert state.ends_s == (105.0 if outcome is Outcome.IGNORE else 108.0)
    assert state.grant.charge_w == (900.0 if outcome is Outcome.OBEY else 500.0)


def test_a_fenced_agent_ignores_older_managers_but_keeps_its_grant() -> None:
    state = fence(held(), 5)
    assert accept(state, grant(4, 1000), 101.0)[1] is Outcome.IGNORE
    assert ceiling_w(state, TERMS) == ceiling_w(held(), TERMS)
    assert accept(state, grant(5, 1), 101.0)[1] is Outcome.OBEY
    assert fence(state, 3).fence_epoch == 5


def test_without_a_word_the_cap_falls_to_the_fail_safe_and_never_rises_to_it() -> None:
    low, reason = tick(held(), 105.0, in_force_w=250.0, fail_safe_w=150.0)
    assert ceiling_w(low, TERMS)[0] == 150.0
    assert "lease ended" in reason
    lower, _ = tick(held(), 105.0, in_force_w=120.0, fail_safe_w=150.0)
    assert ceiling_w(lower, TERMS)[0] == 120.0
    again, _ = tick(lower, 106.0, in_force_w=300.0, fail_safe_w=150.0)
    assert ceiling_w(again, TERMS)[0] == 120.0


def test_after_the_lease_only_a_newer_grant_lifts_the_cap() -> None:
    ended, _ = tick(held(), 200.0, in_force_w=250.0, fail_safe_w=150.0)
    state, outcome, _ = accept(ended, grant(2, 7), 201.0)
    assert (outcome, ceiling_w(state, TERMS)[0]) == (Outcome.IGNORE, 150.0)
    state, outcome, _ = accept(ended, grant(2, 8), 201.0)
    assert (outcome, ceiling_w(state, TERMS)[0]) == (Outcome.OBEY, TERMS.cap_w(500.0))


def test_a_clock_that_goes_back_never_extends_a_lease() -> None:
    state, reason = tick(held(100.0), 99.0, in_force_w=250.0, fail_safe_w=150.0)
    assert state.expired
    assert "clock" in reason


def test_before_the_first_grant_limits_stay_as_they_are() -> None:
    state, _ = tick(LeaseState(), 1e9, in_force_w=400.0, fail_safe_w=150.0)
    assert not state.expired
    assert ceiling_w(state, TERMS)[0] is None


@pytest.mark.parametrize(
    "bad", [grant(9, 9, charge_w=math.nan), grant(9, 9, charge_w=math.inf), grant(9, 9, lease_s=0.0)]
)
def test_a_grant_that_is_none_is_ignored(bad) -> None:
    assert accept(held(), bad, 101.0)[:2] == (held(), Outcome.IGNORE)


def test_a_grant_for_another_replica_is_ignored() -> None:
    other = grant(9, 9, 100.0, replica_id="other")
    assert accept(held(), other, 101.0)[1] is Outcome.IGNORE


def test_a_pinned_cap_is_never_above_what_the_charge_pays_for() -> None:
    for pin_w, cap_w in ((150.0, 150.0), (50.0, 100.0), (399.0, TERMS.cap_w(500.0))):
        state = accept(LeaseState(), grant(1, 1, pin_cap_w=pin_w), 0.0)[0]
        assert ceiling_w(state, TERMS)[0] == cap_w


@given(
    messages=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 6), st.floats(200, 900), st.floats(-3, 8)), min_size=1, max_size=30
    )
)
def test_no_late_or_repeated_message_ever_raises_a_cap(messages) -> None:
    state, now_s, newest = LeaseState(), 0.0, (0, 0)
    for epoch, seq, charge_w, step_s in messages:
        now_s += step_s
        before_w = ceiling_w(state, TERMS)[0]
        state, _, _ = accept(state, grant(epoch, seq, charge_w), now_s)
        after_w = ceiling_w(state, TERMS)[0]
        if (epoch, seq) <= newest:
            assert after_w == before_w
        newest = max(newest, (epoch, seq))
        state, _ = tick(state, now_s + 0.1, in_force_w=after_w, fail_safe_w=150.0)


@given(
    a_w=st.floats(0, 300),
    b=st.floats(0, 0.3),
    floors_w=st.lists(st.floats(0, 180), min_size=1, max_size=8),
    spare=st.integers(0, 4),
    share=st.floats(0, 1),
)
def test_a_cap_costs_no_more_than_its_charge_and_no_larger_one_would_do(a_w, b, floors_w, spare, share) -> None:
    terms = charge_terms(node_gpus=len(floors_w) + spare, overhead=Overhead(a_w, b), floors_w=tuple(floors_w))
    charge_w = terms.least_charge_w + share * (terms.most_charge_w - terms.least_charge_w)
    cap_w = terms.cap_w(charge_w)
    assert 100.0 <= cap_w <= 400.0
    assert terms.charge_w(cap_w) <= charge_w + 1e-4
    if cap_w < 400.0:
        assert terms.charge_w(cap_w + 0.002) > charge_w - 1e-4
    assert terms.cap_w(terms.charge_w(cap_w)) == pytest.approx(max(cap_w, min(floors_w)), abs=0.002)


def test_a_charge_under_the_least_still_gives_the_lowest_limit() -> None:
    assert TERMS.cap_w(0.0) == 100.0
