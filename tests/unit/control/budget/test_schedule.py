"""Schedules: every entry kept from its start on, ramps on the safe side of it, and the next change foretold."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.control.budget.schedule import Entry, Schedule, at_least, budget_at

HOUR = 3600.0
NOON = 1_782_907_200.0  # 2026-07-01 12:00 UTC


def watts(schedule, wall_s, base_w=1000.0):
    return budget_at(schedule, base_w, wall_s).budget_w


@st.composite
def schedules(draw):
    def entry():
        start = draw(st.one_of(st.just(-math.inf), st.integers(0, 100)))
        length = draw(st.one_of(st.just(math.inf), st.integers(1, 50)))
        end = length if start == -math.inf else start + length
        return Entry(
            float(start), float(end), draw(st.integers(100, 2000)), draw(st.sampled_from([0.0, 1.0, 7.0, 40.0]))
        )

    return Schedule(tuple(entry() for _ in range(draw(st.integers(0, 5)))))


instants = st.floats(-50.0, 200.0)
bases = st.integers(100, 2000)


def test_outside_every_entry_the_set_budget_holds():
    schedule = Schedule((Entry(NOON, NOON + HOUR, 600),))
    before = budget_at(schedule, 1000, NOON - 1)
    assert before.budget_w == 1000
    assert before.next_change_s == NOON
    assert before.reason == "the budget that is set, 1000 W: no entry of the schedule holds, until 2026-07-01T12:00:00Z"
    after = budget_at(schedule, 1000, NOON + HOUR)
    assert (after.budget_w, after.next_change_s) == (1000, math.inf)


def test_an_entry_holds_from_its_start_until_its_end():
    schedule = Schedule((Entry(NOON, NOON + HOUR, 600),))
    during = budget_at(schedule, 1000, NOON)
    assert during.budget_w == 600
    assert during.reason == "entry 1 of the schedule: 600 W, until 2026-07-01T13:00:00Z"
    assert watts(schedule, NOON + HOUR - 1e-3) == 600


def test_a_ramp_down_is_over_at_the_start_and_a_ramp_up_begins_at_the_end():
    schedule = Schedule((Entry(NOON, NOON + HOUR, 600, ramp_s=400),))
    assert watts(schedule, NOON - 401) == 1000
    assert watts(schedule, NOON - 100) == pytest.approx(700)
    assert watts(schedule, NOON) == 600
    assert watts(schedule, NOON + HOUR) == 600
    assert watts(schedule, NOON + HOUR + 100) == pytest.approx(700)
    assert watts(schedule, NOON + HOUR + 400) == 1000


def test_on_a_ramp_the_reason_says_where_it_leads():
    schedule = Schedule((Entry(NOON, NOON + HOUR, 600, ramp_s=400),))
    down = budget_at(schedule, 1000, NOON - 100)
    assert down.reason == "on the ramp down from 1000 W to 600 W, which ends at 2026-07-01T12:00:00Z"
    assert down.next_change_s == NOON - 100
    up = budget_at(schedule, 1000, NOON + HOUR + 100)
    assert up.reason == "on the ramp up from 600 W to 1000 W, which ends at 2026-07-01T13:06:40Z"


def test_an_entry_above_the_set_budget_ramps_inside_itself():
    schedule = Schedule((Entry(NOON, NOON + HOUR, 1500, ramp_s=500),))
    assert watts(schedule, NOON) == 1000
    assert watts(schedule, NOON + 250) == pytest.approx(1250)
    assert watts(schedule, NOON + HOUR - 250) == pytest.approx(1250)
    assert watts(schedule, NOON + HOUR) == 1000


def test_between_two_entries_the_ramp_of_the_lower_counts():
    schedule = Schedule((Entry(NOON - HOUR, NOON, 900, ramp_s=10), Entry(NOON, NOON + HOUR, 500, ramp_s=400)))
    assert watts(schedule, NOON - 200) == pytest.approx(700)
    turned = Schedule((Entry(NOON - HOUR, NOON, 500, ramp_s=400), Entry(NOON, NOON + HOUR, 900, ramp_s=10)))
    assert watts(turned, NOON + 200) == pytest.approx(700)


def test_where_entries_overlap_the_lowest_holds():
    schedule = Schedule((Entry(-math.inf, math.inf, 900), Entry(NOON, NOON + HOUR, 500), Entry(NOON, NOON + 60, 700)))
    assert [watts(schedule, NOON + t) for t in (-1, 0, 60, HOUR)] == [900, 500, 500, 900]


def test_open_ends_reach_for_ever():
    schedule = Schedule((Entry(-math.inf, NOON, 700), Entry(NOON + HOUR, math.inf, 500, ramp_s=60)))
    assert watts(schedule, 0.0) == 700
    last = budget_at(schedule, 1000, NOON + 1e9)
    assert (last.budget_w, last.next_change_s) == (500, math.inf)
    assert last.reason == "entry 2 of the schedule: 500 W, from now on"


def test_an_empty_schedule_is_the_set_budget():
    assert budget_at(Schedule(), 1000, NOON).budget_w == 1000


@given(schedules(), bases, instants)
def test_the_budget_is_never_above_an_entry_that_holds_nor_above_the_base_without_one(schedule, base_w, wall_s):
    holding = [e.budget_w for e in schedule.entries if e.start_s <= wall_s < e.end_s]
    now_w = watts(schedule, wall_s, base_w)
    assert now_w <= (min(holding) if holding else base_w)
    assert now_w >= min([base_w, *(e.budget_w for e in schedule.entries)])


@given(schedules(), bases, instants, st.floats(0.0, 1.0))
def test_until_the_next_change_the_budget_stays(schedule, base_w, wall_s, share):
    now = budget_at(schedule, base_w, wall_s)
    assert now.next_change_s >= wall_s
    later_s = wall_s + share * (min(now.next_change_s, 300.0) - wall_s)
    if later_s < now.next_change_s:
        assert watts(schedule, later_s, base_w) == pytest.approx(now.budget_w, abs=1e-6)


@given(
    st.integers(100, 2000),
    st.integers(1, 100),
    st.floats(0.1, 100.0),
    bases,
    st.lists(instants, min_size=2, max_size=9),
)
def test_a_lone_entry_changes_the_budget_one_way_on_each_side_of_it(entry_w, length_s, ramp_s, base_w, times_s):
    schedule = Schedule((Entry(0.0, float(length_s), entry_w, ramp_s),))
    if entry_w > base_w:
        ramp_s = min(ramp_s, length_s / 2)
        schedule = Schedule((Entry(0.0, float(length_s), entry_w, ramp_s),))
    middle_s = length_s / 2
    towards = 1 if entry_w > base_w else -1
    for side, sign in ((lambda t: t <= middle_s, towards), (lambda t: t >= middle_s, -towards)):
        seen_w = [watts(schedule, t, base_w) for t in sorted(times_s) if side(t)]
        assert all(sign * (b - a) >= -1e-9 for a, b in pairwise(seen_w))


@given(schedules(), bases, instants)
def test_with_ramps_everywhere_the_budget_has_no_steps(schedule, base_w, wall_s):
    ramped = Schedule(tuple(Entry(e.start_s, e.end_s, e.budget_w, e.ramp_s or 3.0) for e in schedule.entries))
    moved_w = abs(watts(ramped, wall_s + 1e-4, base_w) - watts(ramped, wall_s, base_w))
    assert moved_w <= 1e-4 * 1900 / 1.0 + 1e-9


def test_too_small_a_budget_is_held_at_what_the_fleet_needs_with_the_watts_named():
    assert at_least(500, 500, "the schedule") == (500, None)
    held_w, warning = at_least(400, 433.2, "the schedule")
    assert held_w == 433.2
    assert warning == ("the schedule asks for 400 W, but the fleet at its lowest caps needs 434 W: held at that")
