"""A replica's menu: what each more watt is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.control.allocation.replica_menu import HEADROOM, replica_menu
from pals_ray.control.replica.batch_choice import best_batch, served_share
from pals_ray.control.replica.demand_feedback import demand_with_queue_tokens_per_s
from pals_ray.control.replica.prediction import latency_score, predict_range
from pals_ray.control.snapshot import Overhead, TailFactors
from pals_ray.types import ReplicaTelemetry, Target
from tests.support.builders import StubModel, replica_snapshot


@pytest.fixture(scope="module")
def on():
    return predict_range(StubModel(), 100, 400, 64)


def best(menu):
    return int(menu.value.argmax())


def test_the_best_point_serves_the_demand_at_the_batch_it_implies_with_the_least_watts(on):
    menu = replica_menu(replica_snapshot(demand=100), on, None)
    k = best(menu)
    assert menu.wanted_tokens_per_s == 100
    assert menu.share[k] == pytest.approx(1.0)
    assert menu.share[k - 1] < 1.0
    smaller = on.batch[np.searchsorted(on.batch, menu.batch_limit[k]) - 1]
    capacity = StubModel().predict(menu.cap_w[k], [smaller, menu.batch_limit[k]]).throughput_tokens_per_s
    assert capacity[0] < 100 <= capacity[1]


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
    assert queued.wanted_tokens_per_s == pytest.approx(10 * 48 / (1 + 48 / 32), rel=0.1)
    assert queued.cap_w[best(queued)] > calm.cap_w[best(calm)]


def test_a_short_queue_asks_for_less_than_all_that_a_full_batch_makes(on):
    short, long = (
        replica_menu(replica_snapshot(demand=60, telemetry=ReplicaTelemetry(running=10, waiting=waiting)), on, None)
        for waiting in (1, 20)
    )
    assert 60 < short.wanted_tokens_per_s < 80
    assert long.wanted_tokens_per_s > 1.5 * short.wanted_tokens_per_s


def test_a_queue_is_prepared_for_where_the_batch_is_nearly_full(on):
    nearly, half = (
        replica_menu(replica_snapshot(demand=100, telemetry=ReplicaTelemetry(running=running)), on, None)
        for running in (62, 32)
    )
    assert half.wanted_tokens_per_s == 100 < nearly.wanted_tokens_per_s < 125


@given(demand=st.floats(0, 500), running=st.integers(0, 64), waiting=st.integers(0, 200))
def test_what_is_wanted_is_never_under_the_demand_and_rises_with_the_queue(on, demand, running, waiting):
    def wanted(queue):
        return demand_with_queue_tokens_per_s(demand, ReplicaTelemetry(running=running, waiting=queue), on)

    assert demand <= wanted(waiting) <= wanted(waiting + 1) <= max(demand, on.capacity_tokens_per_s[-1].max())


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


def test_a_latency_limit_makes_no_batch_so_small_that_requests_would_wait(on):
    share = served_share(on, 200, latency_score(Target(itl_p99_s=0.15), on))
    chosen = best_batch(on, 200, 200, share)
    enough = on.capacity_tokens_per_s.max(axis=1) >= 200
    assert enough.any()
    assert (on.capacity_tokens_per_s[np.flatnonzero(enough), chosen[enough]] >= 200).all()


def test_of_an_overload_less_is_let_in_where_the_latency_of_all_would_be_worse(on):
    free = replica_menu(replica_snapshot(demand=400), on, None)
    limited = replica_menu(replica_snapshot(demand=400, target=Target(itl_p99_s=0.15)), on, None)
    assert limited.batch_limit[best(limited)] < free.batch_limit[best(free)] == 64


def test_of_an_overload_all_are_let_in_where_those_kept_out_would_miss_the_ttft(on):
    limited = replica_menu(replica_snapshot(demand=400, target=Target(itl_p99_s=0.15, ttft_p99_s=1.0)), on, None)
    assert limited.batch_limit[best(limited)] == 64


def test_a_pinned_batch_limit_is_used_as_the_demand_makes_it(on):
    limited = replica_snapshot(demand=200, target=Target(itl_p99_s=0.15))
    pinned = replica_menu(limited, on, None, pin_batch_limit=64)
    assert pinned.batch_limit[best(pinned)] > 32
    assert pinned.value.max() < replica_menu(limited, on, None).value.max()
    assert replica_menu(replica_snapshot(demand=50), on, None, pin_batch_limit=64).batch_limit[-1] < 10


def test_a_point_that_misses_a_limit_is_worth_less_than_the_best_that_does_not(on):
    menu = replica_menu(replica_snapshot(demand=200, target=Target(ttft_p99_s=0.1)), on, None)
    late = menu.cap_w < 199
    assert menu.share[late].max() < menu.share[~late].max()
    assert (np.diff(menu.share[late]) > 0).all()


def test_with_demand_the_floor_holds_the_minimum_share_and_the_ttft_limit(on):
    share = replica_menu(replica_snapshot(demand=200, target=Target(min_share=0.6)), on, None)
    assert share.share[share.floor] >= 0.6 > share.share[share.floor - 1]
    ttft = replica_menu(replica_snapshot(demand=200, target=Target(ttft_p99_s=0.1)), on, None)
    assert ttft.cap_w[ttft.floor] == pytest.approx(200, abs=3.01)
    assert replica_menu(replica_snapshot(demand=0.0, target=Target(ttft_p99_s=0.1)), on, None).floor == 0


def test_the_burst_floor_holds_without_demand(on):
    menu = replica_menu(replica_snapshot(demand=0.0, target=Target(burst_floor_w=250)), on, None)
    assert menu.extra_w[menu.floor] >= 147  # the last cap of the grid that a most grant of 250 W pays for
    assert menu.most_extra_w == 150


def test_a_parked_replica_offers_its_least_charge_only(on):
    menu = replica_menu(replica_snapshot(demand=100, parked=True), on, None)
    assert (menu.extra_w == 0).all()
    assert menu.floor == 0


def test_a_replica_whose_agent_sees_longer_latencies_than_predicted_needs_more_watts(on):
    replica = replica_snapshot(demand=100, natural_draw_w=250.0, target=Target(itl_p99_s=0.2))
    believed, seen = (replica_menu(replace(replica, tails=TailFactors(itl=factor)), on, None) for factor in (1.0, 1.1))
    assert min(seen.share[best(seen)], believed.share[best(believed)]) > 0.98
    assert seen.cap_w[best(seen)] > believed.cap_w[best(believed)]
