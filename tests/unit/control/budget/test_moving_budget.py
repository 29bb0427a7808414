"""What moves the budget: a schedule by wall time, a signal by the time since it began, never under what is needed."""

import math

import pytest

from pals_ray.control.budget.moving_budget import BudgetMover, FollowedSignal
from pals_ray.control.budget.regulation import RegulationError
from pals_ray.control.budget.schedule import Entry, Schedule
from pals_ray.control.budget.signal_following import FleetWatts, Following

WALL_S, NOW_S = 1_800_000_000.0, 50.0
ROOMY = FleetWatts(needed_w=400.0, occupied_w=1200.0, drawn_w=None)


def scheduled(*entries, set_w=1200.0):
    return BudgetMover(Schedule(entries), set_w, WALL_S, NOW_S)


def following(value=(1.0, 0.0, -1.0), *, started_s=WALL_S, wall_s=WALL_S, now_s=NOW_S, ceiling_w=1100.0, smooth_s=0.0):
    how = Following(base_w=900.0, range_w=100.0, ceiling_w=ceiling_w, smooth_s=smooth_s)
    times_s = tuple(10.0 * i for i in range(len(value)))
    return BudgetMover(FollowedSignal(how, times_s, tuple(value), started_s), 1200.0, wall_s, now_s)


def test_a_schedule_moves_the_budget_at_its_instants_and_gives_back_the_one_that_was_set():
    mover = scheduled(Entry(WALL_S + 10, WALL_S + 20, 800.0))
    rows = [mover.ask(ROOMY, WALL_S + at, NOW_S + at) for at in (0, 9.99, 10, 19.99, 20)]
    assert [budget_w for budget_w, _ in rows] == [1200, 1200, 800, 800, 1200]
    assert [source.next_change_s for _, source in rows] == [WALL_S + 10] * 2 + [WALL_S + 20] * 2 + [None]
    assert rows[2][1].kind == "schedule"
    assert rows[2][1].set_w == 1200
    assert "entry 1 of the schedule: 800 W" in rows[2][1].reason


def test_it_is_to_be_looked_at_again_at_the_schedules_next_change_and_every_beat_on_a_ramp():
    mover = scheduled(Entry(WALL_S + 10, math.inf, 800.0, ramp_s=5.0))
    for at, wait_s in ((0.0, 1.0), (4.75, 0.25), (6.0, 1.0), (9.5, 1.0), (11.0, 1.0)):
        mover.ask(ROOMY, WALL_S + at, NOW_S + at)
        assert mover.wait_s(WALL_S + at, at_most_s=1.0) == pytest.approx(wait_s, abs=1e-5), at


def test_a_change_that_has_come_since_it_was_asked_is_looked_at_at_once():
    mover = scheduled(Entry(WALL_S + 10, math.inf, 800.0))
    mover.ask(ROOMY, WALL_S + 9.999, NOW_S + 9.999)
    assert mover.wait_s(WALL_S + 10.001, at_most_s=1.0) == 0.0


def test_a_schedule_goes_by_the_wall_clock_even_where_that_jumps():
    mover = scheduled(Entry(WALL_S + 3600, math.inf, 800.0))
    assert mover.ask(ROOMY, WALL_S, NOW_S)[0] == 1200
    assert mover.ask(ROOMY, WALL_S + 3600, NOW_S + 1)[0] == 800


def test_a_signal_goes_by_the_time_since_it_began_wherever_the_wall_clock_jumps():
    mover = following()
    assert mover.ask(ROOMY, WALL_S, NOW_S)[1].asked_w == 1000
    assert mover.ask(ROOMY, WALL_S - 7200, NOW_S + 12)[1].asked_w == 900
    assert mover.ask(ROOMY, WALL_S + 7200, NOW_S + 25)[1].asked_w == 800


def test_a_new_manager_goes_on_where_the_signal_is_by_now():
    again = following(wall_s=WALL_S + 25, now_s=3.0)
    budget_w, source = again.ask(ROOMY, WALL_S + 25, 3.0)
    assert (budget_w, source.asked_w, source.kind) == (800, 800, "signal")
    assert "5 s of it left" in source.reason


def test_the_signal_is_smoothed_as_following_says():
    mover = following((1.0, -1.0), smooth_s=10.0)
    assert mover.ask(ROOMY, WALL_S, NOW_S + 15)[1].asked_w == pytest.approx(900)


def test_after_its_end_the_base_holds():
    budget_w, source = following().ask(ROOMY, WALL_S, NOW_S + 100)
    assert budget_w == 900
    assert "it has ended" in source.reason


def test_the_draw_is_fed_back_under_the_ceiling():
    mover = following((1.0,) * 10, ceiling_w=1050.0)
    at = 0
    for at in range(60):
        occupied = FleetWatts(400.0, 1050.0, 950.0 if at else None)
        budget_w, _ = mover.ask(occupied, WALL_S + at, NOW_S + at)
        assert budget_w <= 1050
    assert budget_w == 1050


@pytest.mark.parametrize("mover", [scheduled(Entry(-math.inf, math.inf, 300.0)), following(ceiling_w=950.0)])
def test_nothing_goes_under_what_the_fleet_needs_and_the_warning_names_it(mover):
    watts = FleetWatts(needed_w=2345.6, occupied_w=2345.6, drawn_w=2000.0)
    for at in range(3):
        budget_w, source = mover.ask(watts, WALL_S + at, NOW_S + at)
        assert budget_w == 2345.6
        assert "2346 W" in source.warning


def test_over_the_ceiling_there_is_a_warning_too():
    budget_w, source = following(ceiling_w=950.0).ask(ROOMY, WALL_S, NOW_S)
    assert budget_w == 950
    assert "over the ceiling of 950 W" in source.warning


def test_a_signal_that_cannot_be_followed_is_refused_at_once():
    with pytest.raises(RegulationError, match="two at least"):
        following((1.0,))
