"""A replica's menu: what each more watt is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.control.allocation.replica_menu import HEADROOM, replica_menu
from pals_ray.control.replica.prediction import predict_range
from pals_ray.control.snapshot import Arrivals, LatencyFactors, Overhead
from pals_ray.types import ReplicaTelemetry, Slo, Target
from tests.support.builders import StubModel, replica_snapshot


@pytest.fixture(scope="module")
def on():
    return predict_range(StubModel(), 100, 400, 64)


def best(menu):
    return int(menu.value.argmax())


def slo(**limits):
    return Target(slo=Slo(**limits))


def test_the_best_point_keeps_the_slo_with_the_least_watts(on):
    menu = replica_menu(replica_snapshot(demand=100, target=slo(ttft_s=1.0, tpot_s=0.4)), on, None)
    k = best(menu)
    assert menu.wanted_tokens_per_s == 100
    assert menu.share[k] == pytest.approx(1.0)
    assert menu.share[k - 1] < 1.0
    assert 100 < menu.cap_w[k] < 300


def test_the_batch_limit_is_the_one_that_the_agent_would_choose(on):
    menu = replica_menu(replica_snapshot(demand=100, target=slo(tpot_s=0.2)), on, None)
    tpot_s = menu.batch_limit[-1] / StubModel().predict(400, menu.batch_limit[-1]).throughput_tokens_per_s
    assert 8 < menu.batch_limit[-1] < 64
    assert tpot_s <= 0.2
    assert replica_menu(replica_snapshot(demand=100, natural_draw_w=400.0), on, None).batch_limit[-1] == 64


def test_without_targets_a_replica_keeps_the_pace_of_its_full_batch_at_the_highest_cap(on):
    free = replica_menu(replica_snapshot(demand=150), on, None)
    assert free.share[best(free)] == pytest.approx(1.0)
    k = best(free)
    assert StubModel().predict(free.cap_w[k], free.batch_limit[k]).throughput_tokens_per_s > 150


def test_of_an_overload_a_higher_cap_is_worth_more(on):
    menu = replica_menu(replica_snapshot(demand=400, target=slo(ttft_s=1.0, tpot_s=1.0)), on, None)
    assert menu.share[0] < menu.share[best(menu) // 2] < menu.share[best(menu)] < 0.6


def test_a_pinned_batch_limit_is_used_and_worth_no_more(on):
    limited = replica_snapshot(demand=150, target=slo(ttft_s=1.0, tpot_s=0.3))
    pinned = replica_menu(limited, on, None, pin_batch_limit=16)
    assert set(pinned.batch_limit) == {16.0}
    assert pinned.value.max() < replica_menu(limited, on, None).value.max()


def test_a_point_that_misses_a_limit_is_worth_less_than_the_best_that_does_not(on):
    menu = replica_menu(replica_snapshot(demand=100, natural_draw_w=300.0, target=slo(ttft_s=0.1)), on, None)
    late = menu.cap_w < 199
    assert menu.share[late].max() < menu.share[~late].max()


def test_with_demand_the_floor_holds_the_minimum_share_and_the_ttft_limit(on):
    kept = replica_menu(replica_snapshot(demand=200, target=Target(min_share=0.6)), on, None)
    assert kept.share[kept.floor] >= 0.6 > kept.share[kept.floor - 1]
    assert replica_menu(replica_snapshot(demand=0.0, target=Target(min_share=0.6)), on, None).floor == 0
    ttft = replica_menu(replica_snapshot(demand=150, natural_draw_w=300.0, target=slo(ttft_s=0.1)), on, None)
    assert ttft.cap_w[ttft.floor] == pytest.approx(200, abs=3.01)
    assert replica_menu(replica_snapshot(demand=0.0, target=slo(ttft_s=0.1)), on, None).floor == 0


def test_what_feedback_says_of_demand_and_latencies_asks_for_more_watts(on):
    def chosen_w(arrivals):
        replica = replica_snapshot(arrivals=arrivals, natural_draw_w=300.0, target=slo(ttft_s=0.12, tpot_s=0.3))
        menu = replica_menu(replica, on, None)
        return menu.cap_w[best(menu)]

    plain = Arrivals(5.0, 20.0)
    assert chosen_w(replace(plain, strain=1.3)) > chosen_w(plain)
    assert chosen_w(replace(plain, latency=LatencyFactors(1.2, 1.2, 1.2))) > chosen_w(plain)


def test_before_demand_is_known_all_that_can_be_served_is_taken_to_come(on):
    menu = replica_menu(replica_snapshot(), on, None)
    assert menu.wanted_tokens_per_s == pytest.approx(on.capacity_tokens_per_s[-1, -1])
    assert best(menu) > 0


@given(demand=st.floats(0, 500), running=st.integers(0, 64), waiting=st.integers(0, 200))
def test_what_is_wanted_is_never_under_the_demand_and_rises_with_the_queue(on, demand, running, waiting):
    def wanted(queue):
        seen = ReplicaTelemetry(running=running, waiting=queue)
        return replica_menu(replica_snapshot(demand=demand, telemetry=seen), on, None).wanted_tokens_per_s

    assert demand * (1 - 1e-9) <= wanted(waiting) <= wanted(waiting + 1) * (1 + 1e-9)


def test_points_rise_by_whole_watts_from_the_least_charge(on):
    overhead = Overhead(a_w=80, b=0.07)
    least_w, most_w = (overhead.charge_w(w, 1, 8) for w in (100, 400))
    replica = replica_snapshot(demand=100, overhead=overhead, least_charge_w=least_w, most_charge_w=most_w)
    menu = replica_menu(replica, on, None)
    assert menu.extra_w[0] == 0
    assert (np.diff(menu.extra_w) >= 0).all()
    assert (menu.extra_w == np.round(menu.extra_w)).all()
    # A charge pays for the cap it is offered with.
    assert (overhead.gpu_w(least_w + menu.extra_w, 1, 8) >= menu.cap_w - 1e-6).all()


def test_no_point_is_above_the_natural_draw_and_headroom(on):
    menu = replica_menu(replica_snapshot(demand=100, natural_draw_w=150), on, None)
    assert menu.extra_w[-1] <= 150 * (1 + HEADROOM) - 100
    assert replica_menu(replica_snapshot(demand=100, natural_draw_w=220), on, None).most_extra_w == 142


def test_a_replica_held_at_its_grant_is_offered_one_step_more(on):
    held = ReplicaTelemetry(binding_share=1.0)
    replica = replica_snapshot(demand=10, natural_draw_w=100, grant_w=200, telemetry=held)
    assert replica_menu(replica, on, None).most_extra_w == 115


def test_without_demand_the_least_is_worth_the_most(on):
    menu = replica_menu(replica_snapshot(demand=0.0), on, None)
    assert best(menu) == 0
    assert menu.share[0] == 1.0


def test_a_queue_is_wanted_served_above_its_arrivals(on):
    queue = ReplicaTelemetry(running=16, waiting=32)
    calm = replica_menu(replica_snapshot(demand=100), on, None)
    queued = replica_menu(replica_snapshot(demand=100, telemetry=queue), on, None)
    assert queued.wanted_tokens_per_s == pytest.approx(100 * (1 + 2 * 32 / 16))
    assert queued.cap_w[best(queued)] > calm.cap_w[best(calm)]


def floored(on, floor_w):
    """A surface whose draw never falls below the clock floor's."""
    power_w = np.maximum(on.power_w, floor_w)
    return replace(on, power_w=power_w, honours_cap=power_w <= on.cap_w[:, None])


def test_the_lowest_cap_is_no_bargain_where_the_clock_floor_draws_more_than_it(on):
    def worth_of_charge(surface):
        menu = replica_menu(replica_snapshot(demand=150), surface, None)
        return menu.value[0] / menu.share[0]

    assert worth_of_charge(floored(on, 150)) == pytest.approx(100 / 150 * worth_of_charge(on), rel=0.01)


def test_a_replica_without_demand_does_not_pay_for_a_clock_floor_that_it_does_not_run_at(on):
    assert best(replica_menu(replica_snapshot(demand=0.0), floored(on, 150), None)) == 0


def test_a_target_below_the_demand_is_enough(on):
    menu = replica_menu(replica_snapshot(demand=150), on, 60.0)
    assert menu.wanted_tokens_per_s == 60
    assert menu.cap_w[best(menu)] < 130


def test_the_burst_floor_holds_without_demand(on):
    menu = replica_menu(replica_snapshot(demand=0.0, target=Target(burst_floor_w=250)), on, None)
    assert menu.extra_w[menu.floor] >= 147  # the last cap of the grid that a most grant of 250 W pays for
    assert menu.most_extra_w == 150


def test_a_parked_replica_offers_its_least_charge_only(on):
    menu = replica_menu(replica_snapshot(demand=100, parked=True), on, None)
    assert (menu.extra_w == 0).all()
    assert menu.floor == 0
